"""Announcements, round trips and routes as the tests of routing write them; random ones for properties."""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import pairwise

from hypothesis import strategies as st

from p2pswarm.core.ids import ModelId, PeerId
from p2pswarm.core.server_info import ServerInfo, ServerState
from p2pswarm.core.span import Span
from p2pswarm.routing.costs import CostModel
from p2pswarm.routing.route import Hop, Route

NUM_BLOCKS = 6


def server(
    name: str,
    start: int,
    end: int,
    rate: float = 100.0,
    room: int = 1 << 20,
    max_length: int = 0,
    next_rtts_s: Mapping[str, float] | None = None,
    dtype: str = "float32",
    queue_delay_s: float = 0.0,
    using_relay: bool = False,
) -> ServerInfo:
    return ServerInfo(
        peer_id=PeerId(name),
        model_id=ModelId("m@0"),
        span=Span(start, end),
        state=ServerState.ONLINE,
        addresses=(),
        num_model_blocks=NUM_BLOCKS,
        throughput_tokens_per_s=rate,
        inference_tokens_per_s=rate,
        forward_tokens_per_s=rate,
        network_tokens_per_s=rate,
        dtype=dtype,
        cache_tokens_left=room,
        max_length=max_length,
        using_relay=using_relay,
        next_rtts_s={PeerId(peer): rtt_s for peer, rtt_s in (next_rtts_s or {}).items()},
        queue_delay_s=queue_delay_s,
    )


def near(*names: str, rtt_s: float = 0.001) -> dict[PeerId, float]:
    """The same round trip to each of them."""
    return {PeerId(name): rtt_s for name in names}


def names(route: Route) -> list[tuple[str, str]]:
    """A route as `[("a", "0:3"), ...]`."""
    return [(hop.peer_id, str(hop.span)) for hop in route.hops]


def every_route(
    servers: Sequence[ServerInfo], start: int, end: int, boundaries: Collection[int] = range(NUM_BLOCKS)
) -> Iterable[tuple[Hop, ...]]:
    """All there are that change servers at boundaries; by default, at any block."""
    if start == end:
        yield ()
        return
    for one in servers:
        for leave in range(start + 1, min(one.span.end, end) + 1):
            if one.span.covers(start) and (leave in boundaries or leave == end):
                for rest in every_route(servers, leave, end, boundaries):
                    yield (Hop(one.peer_id, Span(start, leave)), *rest)


def edges_of_spans(servers: Iterable[ServerInfo]) -> set[int]:
    return {edge for server in servers for edge in (server.span.start, server.span.end)}


def decode_us(
    hops: Sequence[Hop],
    servers: Mapping[PeerId, ServerInfo],
    round_trips_s: Mapping[PeerId, float],
    cache_tokens: int = 0,
    pushes: bool = True,
    kept: Collection[Hop] = (),
) -> int:
    """What a token takes over these hops, reckoned along the route and not in a graph."""
    costs = CostModel()

    def to_client_us(peer_id: PeerId) -> int:
        return costs.half_round_trip_us(round_trips_s.get(peer_id))

    total_us = to_client_us(hops[0].peer_id) + to_client_us(hops[-1].peer_id)
    for before, after in pairwise(hops):
        source, target = servers[before.peer_id], servers[after.peer_id]
        ways_us = [to_client_us(before.peer_id) + to_client_us(after.peer_id)]
        announced = pushes and before.peer_id != after.peer_id and after.peer_id in source.next_rtts_s
        ends, begins = source.span.end == before.span.end, target.span.start == after.span.start
        at_an_end = ends or begins or before in kept or after in kept
        if announced and source.dtype == target.dtype and at_an_end:
            ways_us.append(costs.half_round_trip_us(source.next_rtts_s[after.peer_id]))
        total_us += min(ways_us)
    for hop in hops:
        info = servers[hop.peer_id]
        total_us += costs.arrival(info, cache_tokens).total_us + hop.span.num_blocks * costs.block_us(info)
    return total_us


spans = st.tuples(st.integers(0, NUM_BLOCKS - 1), st.integers(1, NUM_BLOCKS)).filter(lambda ends: ends[0] < ends[1])
round_trips = st.sampled_from([0.0, 0.001, 0.02, 0.02, 0.3, 9.0, math.inf, None])


@st.composite
def worlds(draw: st.DrawFn, max_servers: int = 4) -> tuple[list[ServerInfo], dict[PeerId, float]]:
    """Servers, some of which announce how far others are, and their round trips from the client."""
    peer_names = [f"peer{i}" for i in range(draw(st.integers(1, max_servers)))]
    servers = [
        server(
            name,
            *draw(spans),
            rate=draw(st.sampled_from([0.0, 10.0, 50.0, 50.0, 900.0])),
            room=draw(st.sampled_from([0, 100])),
            next_rtts_s=draw(
                st.dictionaries(st.sampled_from([*peer_names, "stranger"]), st.sampled_from([0.0, 0.01, 0.4]))
            ),
            dtype=draw(st.sampled_from(["float32", "float32", "bfloat16"])),
            queue_delay_s=draw(st.sampled_from([0.0, 0.0, 0.05, math.inf])),
            using_relay=draw(st.booleans()),
        )
        for name in peer_names
    ]
    measured = {PeerId(name): draw(round_trips) for name in peer_names}
    return servers, {peer_id: rtt_s for peer_id, rtt_s in measured.items() if rtt_s is not None}
