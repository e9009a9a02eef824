"""Batches through frozen blocks in the swarm, and the gradients of a loss back, for whoever trains around them.

A batch is cut into sub-batches of rows, each of which goes by servers of its own, several at a time: so all servers of
a chain work at once, and several chains do. Servers keep nothing between the calls; what the way back needs is the
`Trail`, a sub-batch's inputs at each server. Where a batch is cut depends on its shape and the config alone, and
gradients are added up in the order of its rows, so that the sums do not depend on who was faster.

Knows nothing of autograd (`client/autograd.py`). `client/walk.py` says how one sub-batch gets through.
"""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace

import torch
import trio

from p2pswarm.client.config import ClientConfig
from p2pswarm.client.hop_calls import CallTerms
from p2pswarm.client.local_blocks import LocalBlocks, check_adapter
from p2pswarm.client.model_servers import ModelServers
from p2pswarm.client.single_error import single_error
from p2pswarm.client.step_input import StepInput, in_rows
from p2pswarm.client.tuning import Tuning
from p2pswarm.client.walk import AnyLeg, Walker
from p2pswarm.core.errors import ConfigError, SwarmingError
from p2pswarm.core.span import Span
from p2pswarm.rpc.client import RpcClient
from p2pswarm.wire.codecs import encode_tensor, is_finite
from p2pswarm.wire.messages import WireTensor
from p2pswarm.wire.tuning import WireTuning

MIN_SUB_BATCH_TOKENS = 256
"""No batch is cut finer than that to keep more servers at work. Three blocks of SmolLM2 on one thread take 8 rows of
128 tokens forward in 0.28 s at once, 0.31 s in 256 tokens at a time, 0.34 s in 128; back in 0.83, 0.84 and 0.95 s."""


@dataclass(frozen=True, slots=True, eq=False)
class Track:
    """How a sub-batch went."""

    terms: CallTerms
    legs: tuple[AnyLeg, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Trail:
    """How a batch went, by its sub-batches: all that its way back needs."""

    tracks: tuple[Track, ...]
    tuning: Tuning | None

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All that it holds: the inputs of all legs, then those of the tuning."""
        inputs = (leg.inputs for track in self.tracks for leg in track.legs)
        return (*inputs, *(self.tuning.tensors if self.tuning is not None else ()))

    def with_tensors(self, tensors: Sequence[torch.Tensor]) -> "Trail":
        """The same way with other tensors, in the order of `tensors`."""
        left = iter(tensors)
        legs = [tuple(replace(leg, inputs=next(left)) for leg in track.legs) for track in self.tracks]
        tuning = None if self.tuning is None else self.tuning.with_tensors(list(left))
        tracks = [
            Track(replace(track.terms, tuning=tuning), some) for track, some in zip(self.tracks, legs, strict=True)
        ]
        return Trail(tuple(tracks), tuning)


class TrainingPass:
    """Any number of batches at once, forward and backward."""

    def __init__(
        self, servers: ModelServers, rpc: RpcClient, config: ClientConfig, local: LocalBlocks | None = None
    ) -> None:
        """`local`: the blocks that are run here and not at servers."""
        self._servers = servers
        self._config = config
        self._local = local
        self._walker = Walker(servers, rpc, config, local)

    async def forward(
        self,
        batch: StepInput,
        tuning: Tuning | None = None,
        adapter: str | None = None,
        blocks: Span | None = None,
        *,
        keeps_trail: bool = True,
    ) -> tuple[torch.Tensor, Trail]:
        """The hidden states [batch, tokens, hidden] after the last of `blocks` (all of the model's), and the trail for
        `backward`, which is empty if it is not to be kept.

        `adapter`: the name or id of one that servers have, by default the config's. Raises `MissingBlocksError` where
        blocks stay without a server, `RemoteError` or `NetworkError` naming the last server that failed when there were
        too many failures, `RequestRefused` when two servers, or the only one, find the request wrong,
        `AdapterNotFound`, `ConfigError` where blocks that are run here cannot do what was asked.
        """
        wanted = blocks or self._servers.facts.span
        self._check(batch, tuning, wanted)
        adapter_id = await self._servers.find_adapter(adapter)
        check_adapter(self._local, adapter_id)
        parts = in_rows(batch, tokens_at_once(batch, self._config), self._config.max_step_bytes // 2)
        outputs: list[torch.Tensor | None] = [None] * len(parts)
        tracks: list[Track | None] = [None] * len(parts)

        async def run(number: int) -> None:
            part = parts[number]
            terms = CallTerms(_encoded(part.attention_mask), _encoded(part.position_ids), adapter_id, tuning)
            output, legs = await self._walker.forward(part.hidden_states, wanted, terms)
            outputs[number] = output.to(batch.hidden_states.dtype)
            tracks[number] = Track(terms, tuple(legs) if keeps_trail else ())

        await self._each(len(parts), run)
        return _joined(outputs), Trail(tuple(track for track in tracks if track is not None), tuning)

    async def backward(self, trail: Trail, grad_outputs: torch.Tensor) -> tuple[torch.Tensor, Tuning | None]:
        """The loss's gradients for the batch and for its tuning, by that for what `forward` gave, of the same shape.

        Raises as `forward` does, and `ConfigError` for gradients that are not finite numbers.
        """
        _check_gradients(trail, grad_outputs)
        counts = [track.legs[0].inputs.shape[0] for track in trail.tracks]
        given = torch.split(grad_outputs, counts)
        found: list[torch.Tensor | None] = [None] * len(counts)
        total = None if trail.tuning is None else trail.tuning.zeros()
        turns = [trio.Event() for _ in range(len(counts) + 1)]
        turns[0].set()

        async def run(number: int) -> None:
            track = trail.tracks[number]
            gradients, parts = await self._walker.backward(track.legs, given[number], track.terms)
            found[number] = gradients.to(grad_outputs.dtype)
            if total is not None:
                await turns[number].wait()
                _add(total, parts)
                turns[number + 1].set()

        await self._each(len(counts), run)
        return _joined(found), total

    async def _each(self, count: int, run: Callable[[int], Awaitable[None]]) -> None:
        """Runs every number, several at a time, begun in their order. The first error ends the others."""
        numbers = iter(range(count))
        errors: list[SwarmingError] = []

        async def work(scope: trio.CancelScope) -> None:
            try:
                for number in numbers:
                    await run(number)
            except SwarmingError as error:  # raised below, though another's comes in the same moment
                errors.append(error)
                scope.cancel()

        with single_error():
            async with trio.open_nursery() as nursery:
                for _ in range(min(count, self._config.max_training_calls)):
                    nursery.start_soon(work, nursery.cancel_scope)
        if errors:
            raise errors[0]

    def _check(self, batch: StepInput, tuning: Tuning | None, blocks: Span) -> None:
        facts = self._servers.facts
        batch.check()
        if batch.position != 0:
            raise ConfigError(f"a pass without a cache starts at position 0, got {batch.position}")
        if batch.hidden_states.shape[2] != facts.hidden_size or not batch.hidden_states.numel():
            raise ConfigError(
                f"blocks of this model take hidden states [batch, tokens, {facts.hidden_size}] of at least a token, "
                f"got {list(batch.hidden_states.shape)}"
            )
        if not facts.span.contains(blocks):
            raise ConfigError(f"this model has the blocks {facts.span}, asked were {blocks}")
        if tuning is not None:
            tuning.check_fits(facts.num_blocks, facts.hidden_size)


def tokens_at_once(batch: StepInput, config: ClientConfig) -> int:
    """The most that a sub-batch may hold: what the config allows, and less where that would leave servers idle."""
    share = -(-batch.num_tokens_in_total // config.max_training_calls)
    return min(config.max_training_tokens, max(share, MIN_SUB_BATCH_TOKENS))


def _check_gradients(trail: Trail, grad_outputs: torch.Tensor) -> None:
    if not all(track.legs for track in trail.tracks):
        raise ConfigError("there is no way back: the batch went forward without keeping a trail")
    inputs = [track.legs[0].inputs for track in trail.tracks]
    shape = [sum(each.shape[0] for each in inputs), *inputs[0].shape[1:]]
    if list(grad_outputs.shape) != shape:
        raise ConfigError(
            f"the way back takes the gradient of what came out forward, {shape}, got {list(grad_outputs.shape)}"
        )
    if not is_finite(grad_outputs):
        raise ConfigError(
            "the loss's gradient for the blocks' output holds NaN or infinity; is the loss finite, the learning rate "
            "too high?"
        )


def _add(total: Tuning, parts: Sequence[tuple[Span, WireTuning]]) -> None:
    for span, part in parts:
        total.add(span, part)


def _encoded(tensor: torch.Tensor | None) -> WireTensor | None:
    return None if tensor is None else encode_tensor(tensor)


def _joined(parts: Sequence[torch.Tensor | None]) -> torch.Tensor:
    """All rows again."""
    whole = [part for part in parts if part is not None]
    return whole[0] if len(whole) == 1 else torch.cat(whole)
