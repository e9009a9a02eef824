"""Counting: what is granted is given back, limits hold at any time, peers that hold nothing are forgotten."""

import contextlib

from hypothesis import given
from hypothesis import strategies as st

from p2pswarm.core.errors import ServerBusy
from p2pswarm.core.ids import PeerId
from p2pswarm.rpc.limits import RpcLimits
from p2pswarm.rpc.usage import Usage

LIMITS = RpcLimits(
    max_streams=6,
    max_streams_per_peer=3,
    max_sessions_per_peer=2,
    max_received_bytes=100,
    max_received_bytes_per_peer=60,
)
actions = st.tuples(st.sampled_from(["open", "session", "receive", "end"]), st.integers(0, 2), st.integers(1, 50))


@given(st.lists(actions, max_size=60))
def test_limits_hold_and_all_is_given_back(asked: list[tuple[str, int, int]]) -> None:
    usage = Usage(LIMITS)
    open_streams: dict[PeerId, list[contextlib.ExitStack]] = {PeerId(name): [] for name in "abc"}
    sessions: dict[contextlib.ExitStack, int] = {}
    for action, peer_index, num_bytes in asked:
        peer_id = PeerId("abc"[peer_index])
        streams = open_streams[peer_id]
        with contextlib.suppress(ServerBusy):
            if action == "open":
                stack = contextlib.ExitStack()
                stack.enter_context(usage.stream(peer_id))
                streams.append(stack)
                sessions[stack] = 0
            elif action == "session" and streams:
                streams[-1].enter_context(usage.session(peer_id))
                sessions[streams[-1]] += 1
            elif action == "receive" and streams:
                usage.change_received(peer_id, num_bytes)
                streams[-1].callback(usage.change_received, peer_id, -num_bytes)
            elif action == "end" and streams:
                stack = streams.pop()
                del sessions[stack]
                stack.close()
        assert usage.num_streams == sum(map(len, open_streams.values())) <= 6
        assert all(len(streams) <= 3 for streams in open_streams.values())
        assert all(sum(sessions[stack] for stack in streams) <= 2 for streams in open_streams.values())
        assert usage.num_sessions == sum(sessions.values())
        assert 0 <= usage.received_bytes <= 100
        assert usage.num_peers == sum(bool(streams) for streams in open_streams.values())
    for streams in open_streams.values():
        for stack in streams:
            stack.close()
    assert (usage.num_peers, usage.num_streams, usage.num_sessions, usage.received_bytes) == (0, 0, 0, 0)
