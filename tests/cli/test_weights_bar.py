"""What a download looks like on a terminal, and that nothing of it reaches a file."""

import io

from rich.console import Console

from p2pswarm.checkpoint.progress import Progress, Work
from swarm_cli.weights_bar import weights_bar

MIB = 1 << 20


def shown(*steps: Progress, terminal: bool) -> str:
    stream = io.StringIO()
    with weights_bar(Console(file=stream, force_terminal=terminal, width=140)) as listener:
        for step in steps:
            listener(step)
    return stream.getvalue()


def test_a_download_is_shown_on_a_terminal_with_how_far_it_is() -> None:
    text = shown(Progress(Work.DOWNLOADING, "tiny/llama", 25 * MIB, 100 * MIB), terminal=True)

    assert "downloading tiny/llama" in text
    assert "25.0/100.0 MiB" in text


def test_a_wait_for_another_process_says_so() -> None:
    text = shown(Progress(Work.WAITING, "hub/x", 0, MIB), terminal=True)

    assert "waiting for another process" in text


def test_nothing_is_written_where_there_is_no_terminal() -> None:
    assert shown(Progress(Work.DOWNLOADING, "tiny/llama", 1, 2), terminal=False).strip() == ""
