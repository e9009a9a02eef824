"""Routes for a session that lost servers in its middle.

The servers after the lost blocks still hold the session's history; any other would have to be sent it and run it. So
each kept hop is one more way through the graph, a whole one from its first block to its last, and every way into or
through another server is charged for bringing it up to the session's position (`RebuildPrices`). The shortest path is
then whatever is best: the lost blocks replaced by one server or several, or the rest routed anew as well.

The graph is built for each repair: it depends on the session, and covers only a part of the model.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

from p2pswarm.core.ids import PeerId
from p2pswarm.core.server_info import ServerInfo
from p2pswarm.routing.graph import (
    TIES,
    AtClient,
    AtServer,
    SpanGraph,
    Vertex,
    boundaries_within,
    can_push,
    hops_along,
)
from p2pswarm.routing.known_servers import KnownServers
from p2pswarm.routing.planner import RepairRequest
from p2pswarm.routing.prices import DecodePrices, RebuildPrices
from p2pswarm.routing.route import Hop, Route
from p2pswarm.routing.search import Graph


class AtKept(NamedTuple):
    """With the server of a kept hop, which has just run the hop's last block."""

    block_index: int
    peer_id: PeerId
    is_kept: bool = True
    """Sets it apart from `AtServer`: its session cannot go on to further blocks."""


AnyVertex = Vertex | AtKept


class Repair:
    """One session's request over the servers that are usable for it."""

    def __init__(
        self,
        request: RepairRequest,
        usable: Mapping[PeerId, ServerInfo],
        known: KnownServers,
        decode: DecodePrices,
    ) -> None:
        self._request = request
        kept = {hop.peer_id for hop in request.kept}
        kept_servers = {peer_id: known.servers[peer_id] for peer_id in kept & known.servers.keys()}
        self._servers = {**usable, **kept_servers}
        self._remaining_tokens = max(1, request.remaining_tokens)
        self._kept_prices = replace(decode, cache_tokens_needed=0)  # its room is what the session holds already
        self._prices = RebuildPrices(decode, request.position, self._remaining_tokens)
        edges_of_kept = [edge for hop in request.kept for edge in (hop.span.start, hop.span.end)]
        boundaries = boundaries_within([*known.span_edges, *edges_of_kept], request.span)
        self._graph = SpanGraph(usable, boundaries, self._prices, request.request.pushes)

    def route(self) -> Route:
        """The cheapest hops. All lost blocks must be held by usable servers."""
        span = self._request.span
        graph: Graph[AnyVertex] = Graph(self._edges())
        found = graph.shortest_path(AtClient(span.start), AtClient(span.end))
        assert found is not None, f"blocks {span} are covered, yet no path was found"
        weight, path = found
        kept = {AtKept(hop.span.end, hop.peer_id): hop for hop in self._request.kept}
        new_hops = hops_along(path)
        hops = (*new_hops, *(kept[place] for place in path if isinstance(place, AtKept)))
        decode_us = weight // TIES - sum(map(self._rebuild_us, new_hops))
        return Route(tuple(sorted(hops, key=lambda hop: hop.span)), decode_us // self._remaining_tokens)

    def _rebuild_us(self, hop: Hop) -> int:
        """What the hop's server was charged beside decoding."""
        server = self._servers[hop.peer_id]
        prefill_us = self._prices.decode.costs.prefill_block_us(server, self._request.position)
        return self._prices.rebuild_us(server) + hop.span.num_blocks * prefill_us

    def _edges(self) -> Iterator[tuple[AnyVertex, AnyVertex, int]]:
        yield from self._graph.edges()
        for hop in self._request.kept:
            yield from self._ways_into(hop)
            yield from self._ways_out_of(hop)

    def _ways_into(self, hop: Hop) -> Iterator[tuple[AnyVertex, AnyVertex, int]]:
        """From the client, and from every server that announces how far it is."""
        there = AtKept(hop.span.end, hop.peer_id)
        server = self._servers.get(hop.peer_id)
        if server is None:  # no longer announced: nothing is known but that its session is open
            yield AtClient(hop.span.start), there, 1
            return
        run_us = hop.span.num_blocks * self._kept_prices.block_us(server)
        yield AtClient(hop.span.start), there, self._weight(self._kept_prices.enter_us(server) + run_us)
        for before, place in self._pushing_at(hop.span.start):
            if can_push(before, server):
                yield place, there, self._weight(self._kept_prices.push_us(before, server) + run_us)

    def _ways_out_of(self, hop: Hop) -> Iterator[tuple[AnyVertex, AnyVertex, int]]:
        """To the client, and on to servers that are new to the session; the next kept hop has its own way in."""
        here = AtKept(hop.span.end, hop.peer_id)
        server = self._servers.get(hop.peer_id)
        if server is None:
            yield here, AtClient(hop.span.end), 1
            return
        yield here, AtClient(hop.span.end), self._weight(self._kept_prices.leave_us(server))
        if self._request.request.pushes:
            for source, target, weight in self._graph.pushes_from(server, hop.span):
                if source.block_index == hop.span.end:
                    yield here, target, weight

    def _pushing_at(self, block_index: int) -> Iterator[tuple[ServerInfo, AnyVertex]]:
        """Who may be at a boundary with its session, new or kept, and push from there."""
        if not self._request.request.pushes:
            return
        for server in self._graph.servers.values():
            if server.span.start < block_index <= server.span.end:
                yield server, AtServer(block_index, server.peer_id)
        for hop in self._request.kept:
            if hop.span.end == block_index and hop.peer_id in self._servers:
                yield self._servers[hop.peer_id], AtKept(block_index, hop.peer_id)

    def _weight(self, decode_us: int) -> int:
        """Of a way into or out of a kept session: decoding alone, for all tokens to come."""
        return decode_us * self._remaining_tokens * TIES + 1
