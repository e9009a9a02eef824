"""Rows on their way through blocks and back, over servers that may fail at any step.

The inputs of every leg stay here, so that a lost server costs its own leg only. Forward, what went into it goes on over
another route. Backward, its blocks are laid anew from the same inputs: where stand-ins cut them in other places, the
rows are run through all but the last of them once more, for the inputs in between. Blocks that the client keeps are
legs too, which cannot be lost.

What comes out does not depend on the servers, as long as they compute alike.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import trio

from p2pswarm.client.config import ClientConfig
from p2pswarm.client.hop_calls import CallTerms, HopCalls
from p2pswarm.client.local_blocks import LocalBlocks, LocalPart
from p2pswarm.client.local_calls import backward_here, forward_here
from p2pswarm.client.model_servers import ModelServers
from p2pswarm.client.recovery import HopFailure, Recovery
from p2pswarm.core.errors import MissingBlocksError, NetworkError, RemoteError, RequestRefused
from p2pswarm.core.span import Span
from p2pswarm.routing.planner import RouteMode, RouteRequest
from p2pswarm.routing.route import Hop, Route
from p2pswarm.rpc.client import RpcClient
from p2pswarm.wire.tuning import WireTuning

HOP_FAILURES = (RemoteError, NetworkError, RequestRefused)


@dataclass(frozen=True, slots=True, eq=False)
class Leg:
    """A part of the way: some blocks at one server."""

    hop: Hop
    inputs: torch.Tensor
    """[rows, tokens, hidden]: what entered the blocks."""


@dataclass(frozen=True, slots=True, eq=False)
class LocalLeg:
    """A part of the way: some blocks in this process."""

    part: LocalPart
    inputs: torch.Tensor
    """As those of a `Leg`."""


AnyLeg = Leg | LocalLeg


class Walker:
    """Takes any number of rows at once, each over its own servers."""

    def __init__(
        self, servers: ModelServers, rpc: RpcClient, config: ClientConfig, local: LocalBlocks | None = None
    ) -> None:
        """`local`: the blocks that are run here and not at servers."""
        self._servers = servers
        self._calls = HopCalls(servers, rpc, config)
        self._config = config
        self._local = local

    async def forward(self, inputs: torch.Tensor, blocks: Span, terms: CallTerms) -> tuple[torch.Tensor, list[AnyLeg]]:
        """What comes out of the blocks [rows, tokens, hidden], and the legs of the way there.

        Raises `MissingBlocksError` where blocks stay without a server, the last failure when there were too many.
        """
        states, legs = inputs, list[AnyLeg]()
        for part in (blocks,) if self._local is None else self._local.parts(blocks):
            if isinstance(part, Span):
                states, more = await self._lay(states, part, terms, Recovery(self._config), to_the_end=True)
                legs += more
            else:
                legs.append(LocalLeg(part, states))
                states = await forward_here(part, states, terms)
        return states, legs

    async def backward(
        self, legs: Sequence[AnyLeg], grad_outputs: torch.Tensor, terms: CallTerms
    ) -> tuple[torch.Tensor, list[tuple[Span, WireTuning]]]:
        """The loss's gradient for what entered the first leg, and for the tuning of each span that has any. Raises as
        `forward` does."""
        gradients, parts = grad_outputs, []
        ahead, recovery = list(legs), Recovery(self._config)
        while ahead:
            leg = ahead.pop()
            if isinstance(leg, LocalLeg):
                gradients, tuning = await backward_here(leg.part, leg.inputs, gradients, terms)
                parts += [] if tuning is None else [(leg.part.span, tuning)]
                continue
            span = leg.hop.span
            if leg.hop.peer_id not in self._servers.banned:
                try:
                    gradients, part = await self._calls.backward(leg.hop, leg.inputs, gradients, terms)
                except HOP_FAILURES as error:
                    await self._note(error, span, recovery)
                else:
                    parts += [] if part is None else [(span, part)]
                    recovery = Recovery(self._config)
                    continue
            _, stand_ins = await self._lay(leg.inputs, span, terms, recovery, to_the_end=False)
            ahead += stand_ins
        return gradients, parts

    async def _lay(
        self, inputs: torch.Tensor, blocks: Span, terms: CallTerms, recovery: Recovery, *, to_the_end: bool
    ) -> tuple[torch.Tensor, list[Leg]]:
        """Legs over the blocks, run one after the other, and what comes out of the last one that was: of all of them,
        or of all but the last."""
        states, legs, done = inputs, list[Leg](), blocks.start
        while done < blocks.end:
            tried = Span(done, blocks.end)
            try:
                route = await self._route(tried, terms, recovery)
                for hop in route.hops:
                    leg, tried = Leg(hop, states), hop.span
                    if to_the_end or hop.span.end < blocks.end:
                        started_at_s = trio.current_time()
                        states = await self._calls.forward(hop, states, terms)
                        recovery.do_not_count(trio.current_time() - started_at_s)
                    legs.append(leg)
                    done = hop.span.end
                    if to_the_end:  # else it is not known yet whether the failure has been made up for
                        recovery = Recovery(self._config)
            except HOP_FAILURES as error:
                await self._note(error, tried, recovery)
            except MissingBlocksError as error:
                await self._wait_for_blocks(error, terms, recovery)
        return states, legs

    async def _route(self, blocks: Span, terms: CallTerms, recovery: Recovery) -> Route:
        request = RouteRequest(
            blocks,
            avoided=frozenset(recovery.avoided),
            mode=RouteMode.MAX_THROUGHPUT,
            pushes=False,
            adapter=terms.adapter,
        )
        return await self._servers.route(request)

    async def _note(self, error: HopFailure, blocks: Span, recovery: Recovery) -> None:
        await self._servers.report_failure(error, recovery)
        recovery.after_failure(error, blocks, trio.current_time())

    async def _wait_for_blocks(self, error: MissingBlocksError, terms: CallTerms, recovery: Recovery) -> None:
        """Waits until another try makes sense. Raises the error when it does not, or when the time is up."""
        if recovery.last_failure is None and not self._servers.may_return(error.missing, 0, terms.adapter):
            raise error
        await trio.sleep(recovery.wait_s(error, trio.current_time()))
        await self._servers.forgive(error.missing, recovery)
