import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import memory_stream_one_way_pair

from swarm_cli import lines
from swarm_cli.lines import Lines


async def read(*pieces: bytes) -> list[str]:
    """The lines of a stream that brings these pieces."""
    sender, receiver = memory_stream_one_way_pair()

    async def write() -> None:
        for piece in pieces:
            await sender.send_all(piece)
            await trio.testing.wait_all_tasks_blocked()
        await sender.aclose()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(write)
        return [line async for line in Lines(receiver)]


@given(st.lists(st.text(st.characters(exclude_characters="\n", codec="utf-8"), max_size=5), max_size=5), st.data())
def test_lines_come_whole_however_their_bytes_come(written: list[str], data: st.DataObject) -> None:
    content = "".join(f"{line}\n" for line in written).encode()
    cut = data.draw(st.integers(0, len(content)))
    pieces = [piece for piece in (content[:cut], content[cut:]) if piece]
    assert trio.run(read, *pieces) == written


async def test_last_line_needs_no_end() -> None:
    assert await read(b"one\ntwo") == ["one", "two"]


async def test_bytes_that_are_no_text_are_marked() -> None:
    assert await read(b"\xff\n") == ["\ufffd"]


async def test_of_a_line_without_end_the_last_part_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "MAX_LINE_BYTES", 4)
    assert await read(b"abc", b"def") == ["cdef"]


async def test_reading_goes_on_after_a_loop_was_left() -> None:
    sender, receiver = memory_stream_one_way_pair()
    await sender.send_all(b"one\ntwo\n")
    await sender.aclose()
    reader = Lines(receiver)
    async for line in reader:
        assert line == "one"
        break
    assert [line async for line in reader] == ["two"]
