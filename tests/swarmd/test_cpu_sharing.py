import pytest

from swarmd.scheduling.cpu_sharing import PERIOD_S, CpuSharing, CpuTimes, read_cpu_times


def shared_after(*, idle: float, own: float, num_cpus: int = 2, seconds: float = 2.0) -> bool:
    """Whether the processors are shared when so many of them were idle, and so many busy with this process."""
    times = iter([CpuTimes(10, 100, 3), CpuTimes(10 + idle * seconds, 100 + num_cpus * seconds, 3 + own * seconds)])
    sharing = CpuSharing(num_cpus, lambda: next(times))
    assert not sharing.is_shared(0.0)
    assert not sharing.is_shared(PERIOD_S / 2)
    return sharing.is_shared(seconds)


def test_a_machine_of_its_own_is_not_shared() -> None:
    assert not shared_after(idle=0.0, own=2.0)
    assert not shared_after(idle=1.9, own=0.1)


def test_one_with_room_for_everybody_is_not_shared() -> None:
    assert not shared_after(idle=1.1, own=0.1)


def test_one_that_others_keep_busy_is_shared() -> None:
    assert shared_after(idle=0.0, own=0.7)
    assert shared_after(idle=0.1, own=8.0, num_cpus=16)


def test_counters_that_stand_still_tell_nothing() -> None:
    times = CpuTimes(1, 2, 3)
    sharing = CpuSharing(2, lambda: times)
    assert not sharing.is_shared(0.0)
    assert not sharing.is_shared(10.0)


def test_the_counters_are_looked_at_once_a_second() -> None:
    looks = []

    def read() -> CpuTimes:
        looks.append(None)
        return CpuTimes(0, 0, 0)

    sharing = CpuSharing(2, read)
    for step in range(101):
        sharing.is_shared(step * 0.1)
    assert len(looks) == pytest.approx(11, abs=1)


def test_the_system_counts_on() -> None:
    before, after = read_cpu_times(), read_cpu_times()
    assert 0 < before.idle_s < before.total_s
    assert after.total_s >= before.total_s
    assert after.own_s >= before.own_s
