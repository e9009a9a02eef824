"""Filling the gaps of a chain: servers are planned for the missing blocks, and brought to where the lost ones were.

A stand-in is sent all that the lost server was sent, from position 0 on; never less, since a server that goes on from
a part of a history answers fluently and wrongly. Only the lost blocks are replaced, unless the planner finds that other
servers for all that follows are worth their replay too. The first chain of a session is a gap over all blocks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
import trio

from p2pswarm.client.chain import Chain, Passage
from p2pswarm.client.config import ClientConfig
from p2pswarm.client.input_history import InputHistory
from p2pswarm.client.link import HopFailed, Link, LinkTerms, open_link
from p2pswarm.client.model_servers import ModelServers, dtype_of
from p2pswarm.client.recovery import Recovery
from p2pswarm.client.single_error import single_error
from p2pswarm.client.step_input import in_parts
from p2pswarm.core.errors import NetworkError, RemoteError, RequestRefused
from p2pswarm.core.ids import PeerId
from p2pswarm.core.server_info import ServerInfo
from p2pswarm.core.span import Span
from p2pswarm.routing.planner import RepairRequest, RouteRequest
from p2pswarm.routing.route import Hop
from p2pswarm.rpc.client import RpcClient

STEP_ID_STRIDE = 1 << 20
"""Between two steps of a session. The ids below a step's belong to the replays that it may need, in so many parts."""


class Mender:
    """Fills the gaps of one session's chain. `nursery` holds the links open."""

    def __init__(
        self, servers: ModelServers, rpc: RpcClient, config: ClientConfig, terms: LinkTerms, nursery: trio.Nursery
    ) -> None:
        self._servers = servers
        self._rpc = rpc
        self._config = config
        self._terms = terms
        self._nursery = nursery

    async def fill_gaps(
        self, chain: Chain, history: InputHistory, passage: Passage, recovery: Recovery
    ) -> list[HopFailed]:
        """Opens links and replays what they have missed, so that `passage` can be run.

        The failures that came up are returned; then there are still gaps. What could be filled, has been. Raises
        `MissingBlocksError` where no server can be planned.
        """
        self._widen_to_what_is_remembered(chain, history)
        if chain.gaps:
            planned = await self._planned(chain, history.length, frozenset(recovery.avoided))
            first_tokens = history.length + passage.step.num_tokens
            failures = await self._open(chain, planned, first_tokens, recovery.open_timeout_s)
            if failures:
                return failures
            history.forget_all_but({link.hop.span.start for link in chain.links})
        answers: torch.Tensor | None = None
        try:
            for link in list(chain.links):
                is_behind = link.length < history.length
                answers = await self._replay(chain, link, history, passage, answers) if is_behind else None
        except HopFailed as failed:
            return [failed]
        return []

    def _widen_to_what_is_remembered(self, chain: Chain, history: InputHistory) -> None:
        """Where the inputs of missing blocks were let go of, they come out of the blocks before, run once more."""
        starts = [gap.start for gap in chain.gaps]
        starts += [link.hop.span.start for link in chain.links if link.length < history.length]
        for start in starts:
            if not history.remembers(start):
                known = max(boundary for boundary in history.boundaries if boundary < start)
                chain.drop([link for link in chain.links if known <= link.hop.span.start <= start])

    async def _planned(self, chain: Chain, position: int, avoided: frozenset[PeerId]) -> dict[Hop, ServerInfo]:
        """The hops to open, with what their servers announce now. Links that the plan goes without are dropped."""
        planned: dict[Hop, ServerInfo] = {}
        for gap in chain.gaps:
            request = RouteRequest(
                gap,
                self._terms.max_length,
                self._terms.batch_size,
                avoided,
                pushes=self._config.use_push,
                adapter=self._terms.adapter,
            )
            kept = _directly_after(gap, chain.links)
            if kept and position:
                remaining = self._terms.max_length - position
                repair = RepairRequest(request, tuple(link.hop for link in kept), position, remaining)
                route = await self._servers.repair(repair)
            else:
                route = await self._servers.route(request)
            chain.drop([link for link in kept if not _is_clear_of(link.hop, route.hops)])
            planned |= {hop: self._servers.known[hop.peer_id] for hop in route.hops if hop not in chain.hops}
        return planned

    async def _open(
        self, chain: Chain, planned: Mapping[Hop, ServerInfo], first_tokens: int, timeout_s: float
    ) -> list[HopFailed]:
        """Opens links at all of the hops at once; the failures."""
        failures: list[HopFailed] = []

        async def open_hop(hop: Hop, server: ServerInfo) -> None:
            try:
                with single_error():
                    link: Link = await self._nursery.start(
                        open_link,
                        self._rpc,
                        hop,
                        server,
                        dtype_of(server),
                        self._terms,
                        first_tokens,
                        timeout_s,
                    )
                chain.add(link)
            except (RemoteError, NetworkError, RequestRefused) as error:
                failures.append(HopFailed(hop, error))

        async with trio.open_nursery() as opening:
            for hop, server in planned.items():
                opening.start_soon(open_hop, hop, server)
        return failures

    async def _replay(
        self, chain: Chain, link: Link, history: InputHistory, passage: Passage, answers_before: torch.Tensor | None
    ) -> torch.Tensor:
        """Sends all inputs of the link's blocks from position 0 on; the answers [batch, length, hidden].

        `answers_before` are those of the link before, if it was replayed just now: they stand in for inputs that there
        is no room to remember. Raises `HopFailed`, with the link dropped.
        """
        start, end = link.hop.span.start, link.hop.span.end
        if history.remembers(start):
            inputs = history.replay(start)
        else:
            assert answers_before is not None, "the gap was not widened"
            inputs = replace(history.replay(chain.span.start), hidden_states=answers_before)
        parts = list(in_parts(inputs, self._config.max_step_bytes))
        first_id = passage.step_id - len(parts)
        answers = [
            await chain.run_link(link, Passage(first_id + number, part, self._terms.codec))
            for number, part in enumerate(parts)
        ]
        link.filled_step_id = passage.step_id
        whole = answers[0] if len(answers) == 1 else torch.cat(answers, dim=1)
        if end < chain.span.end and not history.remembers(end):
            history.put(end, 0, whole)
        return whole


def _directly_after(gap: Span, links: Sequence[Link]) -> list[Link]:
    """The links that follow the gap, up to the next one."""
    following: list[Link] = []
    end = gap.end
    for link in links:
        if link.hop.span.start == end:
            following.append(link)
            end = link.hop.span.end
    return following


def _is_clear_of(hop: Hop, hops: Sequence[Hop]) -> bool:
    """Whether a link can stay beside a plan: it is part of it, or the plan does not touch its blocks."""
    return hop in hops or not any(hop.span.start < other.span.end and other.span.start < hop.span.end for other in hops)
