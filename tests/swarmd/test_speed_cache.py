"""A machine is measured once; a new measurement is made where anything differs, or nothing sensible is kept."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest

from swarmd.speed_cache import MAX_ENTRIES, MeasuredOn, SpeedCache
from swarmd.throughput import ComputeSpeed, Measurement

ON = MeasuredOn("tiny@0123456789abcdef", 10, "cpu of some make", "float32", "none", 1, "torch 2")
SPEED = ComputeSpeed(decode_s=0.01, batched_decode_s=0.02, prefill_token_s=0.001)


class Machine:
    """Counts how often it is measured; each time it is a little slower."""

    def __init__(self, *, is_busy: bool = False) -> None:
        self.times = 0
        self.is_busy = is_busy

    def measure(self) -> Measurement:
        self.times += 1
        return Measurement(replace(SPEED, decode_s=0.01 * self.times), was_disturbed=self.is_busy)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "speeds.json"


def test_what_was_measured_is_found_by_the_next_process(path: Path) -> None:
    machine = Machine()
    first = SpeedCache(path).measured_before(ON, machine.measure)
    assert SpeedCache(path).measured_before(ON, machine.measure) == first == SPEED
    assert machine.times == 1


@pytest.mark.parametrize(
    "other",
    [
        replace(ON, model_id="tiny@fedcba9876543210"),
        replace(ON, num_blocks=11),
        replace(ON, device="cpu of another make"),
        replace(ON, dtype="bfloat16"),
        replace(ON, quantization="nf4"),
        replace(ON, threads=2),
        replace(ON, versions="torch 3"),
    ],
)
def test_whatever_differs_is_measured(path: Path, other: MeasuredOn) -> None:
    machine = Machine()
    SpeedCache(path).measured_before(ON, machine.measure)
    SpeedCache(path).measured_before(other, machine.measure)
    assert machine.times == 2


def test_a_new_measurement_takes_the_place_of_the_kept_one(path: Path) -> None:
    machine = Machine()
    cache = SpeedCache(path)
    cache.measured_before(ON, machine.measure)
    assert cache.measured_anew(ON, machine.measure).decode_s == 0.02
    assert cache.measured_before(ON, machine.measure).decode_s == 0.02


def test_a_disturbed_measurement_is_used_once(path: Path) -> None:
    busy = Machine(is_busy=True)
    assert SpeedCache(path).measured_before(ON, busy.measure) == SPEED
    assert not path.exists()
    SpeedCache(path).measured_before(ON, Machine().measure)
    SpeedCache(path).measured_anew(ON, busy.measure)
    assert SpeedCache(path).measured_before(ON, busy.measure) == SPEED


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", '"speeds"', b"\xff\xfe".decode("latin-1")])
def test_a_damaged_file_means_measuring_anew(path: Path, text: str, caplog: pytest.LogCaptureFixture) -> None:
    path.parent.mkdir()
    path.write_text(text, encoding="latin-1")
    with caplog.at_level(logging.ERROR):
        assert SpeedCache(path).measured_before(ON, Machine().measure) == SPEED
    assert json.loads(path.read_text()).keys() == {ON.key}


@pytest.mark.parametrize(
    "entry",
    [None, [], {"decode_s": 1.0}, {"decode_s": 0.0, "batched_decode_s": 1.0, "prefill_token_s": 1.0}]
    + [{"decode_s": wrong, "batched_decode_s": 1.0, "prefill_token_s": 1.0} for wrong in (-1.0, "1", None, 1e999)],
)
def test_an_entry_without_sense_means_measuring_anew(path: Path, entry: object) -> None:
    path.parent.mkdir()
    path.write_text(json.dumps({ON.key: entry}))
    machine = Machine()
    assert SpeedCache(path).measured_before(ON, machine.measure) == SPEED
    assert machine.times == 1


def test_the_oldest_entries_are_forgotten(path: Path) -> None:
    cache = SpeedCache(path)
    for threads in range(MAX_ENTRIES + 1):
        cache.measured_before(replace(ON, threads=threads), Machine().measure)
    kept = json.loads(path.read_text())
    assert len(kept) == MAX_ENTRIES
    assert replace(ON, threads=0).key not in kept
