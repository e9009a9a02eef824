"""The comparison of relayed and direct paths runs and judges as it says; the targets need a quiet machine."""

import pytest
import trio

from simulations.relay.run import measure, meets_targets, ratios, table

pytestmark = [pytest.mark.real, pytest.mark.slow]


def test_comparison_runs_at_a_tiny_size_and_prints_both_paths_and_the_relay() -> None:
    medians = trio.run(measure, 1, 20, 32)
    assert medians["relay"]["cpu_s_per_gib"] > 0  # told in ticks of 10 ms, of which 32 MiB take several
    found = ratios(medians)
    printed = table(medians, found)
    for name in ("direct", "relayed", "relay itself", "target"):
        assert name in printed
    assert found["round_trip"] > 1


def test_targets_are_met_or_missed_by_the_stated_figures() -> None:
    assert meets_targets({"round_trip": 3.0, "bandwidth": 1 / 3})
    assert not meets_targets({"round_trip": 3.01, "bandwidth": 1.0})
    assert not meets_targets({"round_trip": 1.0, "bandwidth": 0.33})
