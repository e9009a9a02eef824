"""Long work on weights is told of a few times, short work not at all."""

from collections.abc import Iterator

import pytest
import trio
import trio.testing

from p2pswarm.checkpoint.progress import Progress, Work
from swarmd.weight_progress import PERIOD_S, WeightProgress

MIB = 1 << 20


async def events_of(steps: Iterator[tuple[float, Progress]]) -> list[dict[str, object]]:
    """What is told when the loading thread reports these steps at these times."""
    told: list[dict[str, object]] = []
    now_s = 0.0

    def take(event: str, **fields: object) -> None:
        told.append({"event": event, **fields})

    listener = WeightProgress(take, clock_s=lambda: now_s)

    def load() -> None:
        nonlocal now_s
        for time_s, progress in steps:
            now_s = time_s
            listener(progress)

    await trio.to_thread.run_sync(load)
    await trio.testing.wait_all_tasks_blocked()
    return told


def download(duration_s: float, step_s: float = 0.25) -> Iterator[tuple[float, Progress]]:
    for step in range(round(duration_s / step_s)):
        yield 100 + step * step_s, Progress(Work.DOWNLOADING, "tiny/llama", step * MIB, 1000 * MIB)


async def test_a_quick_download_is_not_told() -> None:
    assert await events_of(download(PERIOD_S)) == []


async def test_a_long_download_is_told_every_few_seconds() -> None:
    told = await events_of(download(10 * PERIOD_S + 1))

    assert len(told) == 10
    assert told[0] == {
        "event": "weights",
        "work": "downloading",
        "what": "tiny/llama",
        "done_bytes": 12 * MIB,
        "total_bytes": 1000 * MIB,
    }


@pytest.mark.parametrize("work", [Work.CONVERTING, Work.HASHING])
async def test_each_kind_of_work_counts_from_its_own_start(work: Work) -> None:
    steps = [*download(PERIOD_S), (103.0, Progress(work, "x", 0, 1)), (105.0, Progress(work, "x", 1, 1))]
    assert await events_of(iter(steps)) == []


async def test_a_wait_for_another_process_is_told_at_once() -> None:
    told = await events_of(iter([(100.0, Progress(Work.WAITING, "hub/x/model.layers.0", 0, MIB))]))

    assert [event["work"] for event in told] == ["waiting"]
