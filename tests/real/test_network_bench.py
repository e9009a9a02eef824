"""The transport comparison runs and judges as it says; whether the targets are met needs a quiet machine."""

import pytest
import trio

from simulations.transport.run import measure, meets_targets, ratios, table

pytestmark = [pytest.mark.real, pytest.mark.slow]


def test_comparison_runs_at_a_tiny_size_and_prints_all_transports() -> None:
    medians = trio.run(measure, 1, 20, 2)
    found = ratios(medians)
    printed = table(medians, found)
    for name in ("ours", "noise+yamux", "bare TCP", "target"):
        assert name in printed
    assert found["round_trip"] > 0


def test_targets_are_met_or_missed_by_the_stated_figures() -> None:
    assert meets_targets({"round_trip": 0.45, "bandwidth": 2.0, "cpu": 0.5})
    assert not meets_targets({"round_trip": 0.46, "bandwidth": 2.0, "cpu": 0.5})
    assert not meets_targets({"round_trip": 0.45, "bandwidth": 1.9, "cpu": 0.5})
    assert not meets_targets({"round_trip": 0.45, "bandwidth": 2.0, "cpu": 0.51})
