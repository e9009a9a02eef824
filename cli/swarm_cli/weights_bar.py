"""A bar on the terminal while a model's weights are downloaded, converted or hashed."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.progress import Progress as Bars

from p2pswarm.checkpoint.progress import Progress, ProgressListener, Work


@contextmanager
def weights_bar(console: Console) -> Iterator[ProgressListener]:
    """A listener for any thread. Its bar is gone when the context ends, and never there but on a terminal."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Bars(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        task = bars.add_task("", visible=False)

        def show(progress: Progress) -> None:
            bars.update(
                task,
                description=_in_words(progress),
                completed=progress.done_bytes,
                total=progress.total_bytes,
                visible=True,
            )

        yield show


def _in_words(progress: Progress) -> str:
    if progress.work is Work.WAITING:
        return "waiting for another process, which is at the same weights"
    return f"{progress.work} {progress.what}"
