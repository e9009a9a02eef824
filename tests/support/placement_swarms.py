"""Swarms for the tests of placement: announcements with no more in them than placement reads."""

from dataclasses import replace

from hypothesis import strategies as st

from p2pswarm.core.ids import ModelId, PeerId
from p2pswarm.core.server_info import ServerInfo, ServerState
from p2pswarm.core.span import Span

NUM_MODEL_BLOCKS = 12


def server(
    name: str,
    span: str,
    throughput: float = 10.0,
    state: ServerState = ServerState.ONLINE,
    *,
    num_model_blocks: int = 30,
    next_span: str | None = None,
    is_pinned: bool = False,
) -> ServerInfo:
    return ServerInfo(
        peer_id=PeerId(name),
        model_id=ModelId("m@0123456789abcdef"),
        span=Span.parse(span),
        state=state,
        addresses=(),
        num_model_blocks=num_model_blocks,
        throughput_tokens_per_s=throughput,
        inference_tokens_per_s=100.0,
        forward_tokens_per_s=1000.0,
        network_tokens_per_s=1000.0,
        dtype="float32",
        next_span=None if next_span is None else Span.parse(next_span),
        is_pinned=is_pinned,
    )


@st.composite
def swarms(draw: st.DrawFn, states: tuple[ServerState, ...] = tuple(ServerState)) -> list[ServerInfo]:
    """Up to eight servers of a model of twelve blocks, most of them online; at least one is."""
    servers = []
    for number in range(draw(st.integers(1, 8))):
        num_blocks = draw(st.integers(1, NUM_MODEL_BLOCKS))
        start = draw(st.integers(0, NUM_MODEL_BLOCKS - num_blocks))
        state = draw(st.sampled_from((ServerState.ONLINE, ServerState.ONLINE, *states)))
        next_start = draw(st.none() | st.integers(0, NUM_MODEL_BLOCKS - num_blocks))
        info = server(
            f"peer-{number}",
            f"{start}:{start + num_blocks}",
            draw(st.sampled_from([0.0, 1.0, 2.0, 3.0]) | st.floats(0.1, 100.0)),
            state if number else ServerState.ONLINE,
            num_model_blocks=NUM_MODEL_BLOCKS,
            is_pinned=draw(st.booleans()) and draw(st.booleans()),
        )
        if state is ServerState.DRAINING and next_start is not None:
            info = replace(info, next_span=Span(next_start, next_start + num_blocks))
        servers.append(info)
    return servers
