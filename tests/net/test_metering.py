"""CPU time of a part of a task: its own steps count, what others do while it waits does not."""

import pytest
import trio
from trio.testing import MockClock

from p2pswarm.net.metering import Metered


class Cpu:
    """A clock that runs only when somebody works."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds

    def work(self, seconds: float) -> None:
        self.seconds += seconds


async def test_only_own_steps_count(autojump_clock: MockClock) -> None:
    cpu = Cpu()

    async def mine() -> str:
        cpu.work(1)
        await trio.sleep(5)
        cpu.work(2)
        return "done"

    async def others() -> None:
        await trio.sleep(2)
        cpu.work(100)

    metered = Metered(mine, cpu)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(others)
        assert await metered == "done"
    assert metered.seconds == 3


async def test_exceptions_pass_through(autojump_clock: MockClock) -> None:
    cpu = Cpu()

    async def fail() -> None:
        await trio.sleep(1)
        cpu.work(1)
        raise ValueError("as it happens")

    metered = Metered(fail, cpu)
    with pytest.raises(ValueError, match="as it happens"):
        await metered
    assert metered.seconds == 1


async def test_cancellation_passes_through_and_cleaning_up_counts(autojump_clock: MockClock) -> None:
    cpu = Cpu()

    async def stay() -> None:
        try:
            await trio.sleep_forever()
        finally:
            cpu.work(1)

    metered = Metered(stay, cpu)
    with trio.move_on_after(3) as scope:
        await metered
    assert scope.cancelled_caught
    assert metered.seconds == 1


async def test_deadlines_and_errors_within_are_handled_within(autojump_clock: MockClock) -> None:
    async def patient() -> bool:
        with trio.move_on_after(1) as scope:
            await trio.sleep_forever()
        return scope.cancelled_caught

    assert await Metered(patient, Cpu())
