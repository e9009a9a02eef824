"""The small parts of the room: negotiation, shared calls, handlers, settings."""

import logging
from collections.abc import Sequence

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from p2pswarm.core.errors import ConfigError, ConnectionLost, PeerUnreachable, ProtocolViolation, SwarmingError
from p2pswarm.core.ids import PeerId, ProtocolId
from p2pswarm.core.nursery import open_transparent_nursery
from p2pswarm.net.config import NetworkConfig
from p2pswarm.net.negotiation import MAX_PROPOSALS, answer, encode_message, propose
from p2pswarm.net.network import Buffer, Stream
from p2pswarm.net.serving import run_handler
from p2pswarm.net.shared_calls import SharedCalls

PEER = PeerId("peer")


class Script:
    """A stream whose peer says what the test lets it say."""

    def __init__(self, incoming: bytes = b"") -> None:
        self.peer_id = PEER
        self.protocol = ProtocolId("/script/1")
        self.incoming = incoming
        self.outgoing = b""
        self.ends: list[str] = []

    async def read(self, max_bytes: int = 1 << 20) -> bytes:
        data, self.incoming = self.incoming[:max_bytes], self.incoming[max_bytes:]
        return data

    async def write(self, *buffers: Buffer) -> None:
        self.outgoing += b"".join(buffers)

    async def close_write(self) -> None:
        self.ends.append("close_write")

    async def close(self) -> None:
        self.ends.append("close")

    def reset(self) -> None:
        self.ends.append("reset")


def messages(*texts: str) -> bytes:
    return b"".join(map(encode_message, texts))


async def test_proposal_goes_out_with_the_greeting_and_leaves_what_follows_unread() -> None:
    stream = Script(messages("/multistream/1.0.0", "/a/1") + b"first bytes")
    await propose(stream, ProtocolId("/a/1"))
    assert stream.outgoing == b"\x13/multistream/1.0.0\n\x05/a/1\n"
    assert stream.incoming == b"first bytes"


@pytest.mark.parametrize(
    ("texts", "complaint"),
    [
        (["/multistream/1.0.0", "na"], "does not speak /a/1"),
        (["/multistream/1.0.0", "/b/1"], "answers '/b/1'"),
        (["/multistream/2.0.0", "/a/1"], "greets with"),
    ],
)
async def test_proposal_that_is_not_taken_is_a_violation(texts: list[str], complaint: str) -> None:
    with pytest.raises(ProtocolViolation, match=complaint):
        await propose(Script(messages(*texts)), ProtocolId("/a/1"))


async def test_peer_that_leaves_in_the_middle_is_lost() -> None:
    with pytest.raises(ConnectionLost):
        await propose(Script(b"\x13/multi"), ProtocolId("/a/1"))


async def test_answer_takes_the_first_proposal_that_is_spoken() -> None:
    stream = Script(messages("/multistream/1.0.0", "/x/1", "/b/1") + b"rest")
    assert await answer(stream, {ProtocolId("/a/1"), ProtocolId("/b/1")}) == "/b/1"
    assert stream.outgoing == messages("/multistream/1.0.0", "na", "/b/1")
    assert stream.incoming == b"rest"


async def test_endless_proposals_are_ended() -> None:
    stream = Script(messages("/multistream/1.0.0", *["/x/1"] * 1000))
    with pytest.raises(ProtocolViolation, match=f"{MAX_PROPOSALS} protocols"):
        await answer(stream, ())


@given(st.binary(max_size=300))
def test_arbitrary_negotiation_bytes_agree_or_raise_ours(data: bytes) -> None:
    async def main() -> None:
        for incoming in (data, messages("/multistream/1.0.0") + data):
            for function in (answer(Script(incoming), ()), propose(Script(incoming), ProtocolId("/a/1"))):
                with pytest.raises(SwarmingError):
                    await function

    trio.run(main)


async def test_calls_for_the_same_key_are_made_once_even_if_the_first_caller_leaves() -> None:
    num_calls = 0
    may_go = trio.Event()

    async def call() -> str:
        nonlocal num_calls
        num_calls += 1
        await may_go.wait()
        return "result"

    results: list[str] = []

    async def ask(calls: SharedCalls[str, str]) -> None:
        results.append(await calls.get("key", call))

    async with trio.open_nursery() as nursery:
        calls: SharedCalls[str, str] = SharedCalls(nursery)
        with trio.move_on_after(0):
            await calls.get("key", call)
        for _ in range(5):
            nursery.start_soon(ask, calls)
        await trio.testing.wait_all_tasks_blocked()
        may_go.set()
    assert (num_calls, results) == (1, ["result"] * 5)


async def test_failed_call_fails_for_all_and_the_next_one_is_new() -> None:
    outcomes: list[PeerUnreachable | str] = [PeerUnreachable("down"), "up"]

    async def call() -> str:
        outcome = outcomes.pop(0)
        if isinstance(outcome, PeerUnreachable):
            raise outcome
        return outcome

    async with trio.open_nursery() as nursery:
        calls: SharedCalls[str, str] = SharedCalls(nursery)
        with pytest.raises(PeerUnreachable, match="down"):
            await calls.get("key", call)
        assert await calls.get("key", call) == "up"


async def test_handler_that_returns_closes_its_stream() -> None:
    async def handler(stream: Stream) -> None:
        await stream.write(b"done")

    stream = Script()
    await run_handler(handler, stream)
    assert stream.ends == ["close", "reset"]


@pytest.mark.parametrize(
    ("errors", "is_logged"),
    [
        ([ConnectionLost("gone")], False),
        ([ZeroDivisionError("bug")], True),
        ([ExceptionGroup("several", [ConnectionLost("gone")])], False),
        ([ExceptionGroup("several", [ConnectionLost("gone"), ZeroDivisionError("bug")])], True),
    ],
    ids=["expected", "bug", "group of expected", "group with a bug"],
)
async def test_handler_that_raises_resets_and_only_bugs_are_logged(
    errors: Sequence[Exception], is_logged: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async def handler(stream: Stream) -> None:
        raise errors[0]

    stream = Script()
    with caplog.at_level(logging.INFO):
        await run_handler(handler, stream)
    assert stream.ends == ["reset"]
    assert ("bug" in caplog.text) == is_logged


async def test_cancelled_handler_passes_the_cancellation_on_alone() -> None:
    async def fail_when_cancelled() -> None:
        try:
            await trio.sleep_forever()
        finally:
            raise ConnectionLost("while cleaning up")

    async def handler(stream: Stream) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            nursery.start_soon(fail_when_cancelled)

    stream = Script()
    with trio.move_on_after(0.01) as scope:
        await run_handler(handler, stream)
    assert scope.cancelled_caught
    assert stream.ends == ["reset"]


async def test_transparent_nursery_passes_a_single_error_through() -> None:
    async def fail() -> None:
        async with open_transparent_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            raise ConfigError("as it is")

    with pytest.raises(ConfigError, match="as it is"):
        await fail()


@pytest.mark.parametrize("setting", ["dial_timeout_s", "ping_interval_s", "max_connections"])
def test_settings_that_cannot_work_are_refused(setting: str) -> None:
    with pytest.raises(ConfigError, match=setting):
        NetworkConfig(**{setting: 0})
