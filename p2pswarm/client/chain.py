"""A chain of links over all blocks of a model, and how a step goes through it.

With push, a server hands its output straight to the next one (2312.08361, section on hand-off): the client tells all of
them of the step at once, sends hidden states only to the first, and takes everyone's output as it comes, for its own
cache. Servers that cannot reach each other are relayed by the client, and so is a step whose push does not arrive.

A chain may have gaps, where links have failed; `client/mending.py` fills them. A step that stopped at a failed link
goes on where it stopped: links that have answered it are not asked again.
"""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch
import trio

from p2pswarm.client.config import ClientConfig
from p2pswarm.client.input_history import InputHistory
from p2pswarm.client.link import HopFailed, Link, decode_finite
from p2pswarm.client.step_input import StepInput
from p2pswarm.client.step_times import StepTimes
from p2pswarm.core.errors import BadAnswer, DeadlineExceeded, NetworkError, RemoteError, RequestRefused
from p2pswarm.core.ids import PeerId
from p2pswarm.core.span import Span, uncovered
from p2pswarm.routing.route import Hop
from p2pswarm.wire.codecs import encode_tensor
from p2pswarm.wire.messages import Codec, PushedStep, Step, StepReply, WireTensor

PUSH_PATIENCE = 1.5
"""A push that takes that many times what the step usually takes is not waited for any longer."""
MIN_PUSH_PATIENCE_S = 0.25
MAX_PUSHED_BYTES = 64 << 10
"""A copy of that size is sent without waiting for the server to read it, which may be busy sending us its answer to the
push: two ends that wait for each other to read would never end. Prompts are relayed."""


class ServerPool(Protocol):
    """What a chain asks of, and tells to, whoever knows the servers; `client/model_servers.py` is the real one."""

    def step_times(self, hop: Hop) -> StepTimes: ...

    def round_trip_s(self, peer_id: PeerId) -> float: ...

    def can_push(self, sender: PeerId, receiver: PeerId) -> bool: ...

    def note_push(self, sender: PeerId, receiver: PeerId, *, arrived: bool) -> None: ...

    async def is_alive(self, peer_id: PeerId) -> bool:
        """Whether the server answers anything at all."""
        ...


@dataclass
class Passage:
    """One step on its way through a chain."""

    step_id: int
    step: StepInput
    codec: Codec
    states: dict[int, torch.Tensor] = field(default_factory=dict)
    """The hidden states at the boundaries that were reached, by block, as they came."""
    received: dict[int, WireTensor] = field(default_factory=dict)
    """The same as they travelled, for sending on without another copy."""

    def __post_init__(self) -> None:
        self.mask, self.position_ids, self.beam_indices = (
            None if tensor is None else encode_tensor(tensor)
            for tensor in (self.step.attention_mask, self.step.position_ids, self.step.beam_indices)
        )

    def whole_step(self, link: Link, next_link: Link | None) -> Step:
        """The step with its hidden states; they must have been reached."""
        return Step(
            self.step_id,
            self.step.position,
            self._hidden_states(link),
            self.mask,
            self.position_ids,
            self._beams(link),
            next_link.as_next_hop if next_link is not None else None,
        )

    def pushed_step(self, link: Link, next_link: Link | None) -> PushedStep:
        """The step as told to a link that gets its hidden states from the link before."""
        return PushedStep(
            self.step_id,
            self.step.position,
            self.step.num_tokens,
            self.mask,
            self.position_ids,
            self._beams(link),
            next_link.as_next_hop if next_link is not None else None,
        )

    def take(self, link: Link, reply: StepReply) -> None:
        """Notes a link's answer. Raises `BadAnswer` where its values or its form cannot be right."""
        answer = decode_finite(reply.hidden_states, link.hop)
        if answer.shape != self.step.hidden_states.shape or answer.dtype != link.dtype:
            raise BadAnswer(
                f"answered {answer.dtype} of shape {list(answer.shape)} to {link.dtype} of shape "
                f"{list(self.step.hidden_states.shape)}",
                link.hop.peer_id,
            )
        end = link.hop.span.end
        self.states[end], self.received[end] = answer, reply.hidden_states
        link.answered_step_id, link.length = self.step_id, self.step.end

    def _hidden_states(self, link: Link) -> WireTensor:
        """For the link's first block: as they came, unless this server computes in another dtype."""
        start = link.hop.span.start
        received = self.received.get(start)
        if received is not None and self.states[start].dtype == link.dtype and received.codec is self.codec:
            return received
        return encode_tensor(self.states[start].to(link.dtype), self.codec)

    def _beams(self, link: Link) -> WireTensor | None:
        """None for a link that was filled during this step: with a history that has followed the beams already."""
        return None if link.filled_step_id == self.step_id else self.beam_indices


@dataclass(frozen=True, slots=True)
class Turn:
    """A link's part in one run of a step."""

    link: Link
    pusher: Link | None = None
    """Who hands the step on to it."""
    next_link: Link | None = None
    """Whom it hands the step on to."""


class Chain:
    """Links in the order of their blocks. Steps must not overlap."""

    def __init__(self, span: Span, codec: Codec, pool: ServerPool, config: ClientConfig) -> None:
        self.span = span
        self.links: list[Link] = []
        self._codec = codec
        self._pool = pool
        self._config = config

    @property
    def hops(self) -> tuple[Hop, ...]:
        return tuple(link.hop for link in self.links)

    @property
    def gaps(self) -> list[Span]:
        """Blocks without a link."""
        return uncovered([link.hop.span for link in self.links], self.span)

    def add(self, link: Link) -> None:
        self.links.append(link)
        self.links.sort(key=lambda other: other.hop.span.start)

    def drop(self, links: Sequence[Link]) -> None:
        """Closes links, which leaves gaps."""
        for link in links:
            link.close()
        self.links = [link for link in self.links if link not in links]

    async def run(self, passage: Passage, history: InputHistory) -> torch.Tensor:
        """The hidden states after the last block. There must be no gaps.

        Raises `HopFailed` when a link fails; it is dropped then.
        """
        passage.states[self.span.start] = passage.step.hidden_states
        turns = self._turns(passage)
        for turn in turns:
            with self._failing(turn.link):
                if turn.pusher is not None:
                    await turn.link.announce(passage.pushed_step(turn.link, turn.next_link))
                elif turn is turns[0]:
                    await turn.link.send(passage.whole_step(turn.link, turn.next_link))
        for turn in turns:
            with self._failing(turn.link):
                await self._pass_through(turn, passage, history)
        return passage.states[self.span.end].to(passage.step.hidden_states.dtype)

    async def run_link(self, link: Link, passage: Passage) -> torch.Tensor:
        """The hidden states after the blocks of one link, which the passage begins at. Raises as `run` does."""
        passage.states[link.hop.span.start] = passage.step.hidden_states
        with self._failing(link):
            await self._pass_through(Turn(link), passage)
        return passage.states[link.hop.span.end]

    def _turns(self, passage: Passage) -> list[Turn]:
        """What each link that has not answered yet is to do."""
        pending = [link for link in self.links if link.answered_step_id != passage.step_id]
        pairs = [pair if self._hands_on(*pair, passage) else (None, None) for pair in itertools.pairwise(pending)]
        pushers = [None, *(pusher for pusher, _ in pairs)]
        next_links = [*(next_link for _, next_link in pairs), None]
        return [Turn(*parts) for parts in zip(pending, pushers, next_links, strict=False)]

    def _hands_on(self, before: Link, link: Link, passage: Passage) -> bool:
        """Whether the one server can hand the step on to the other, and neither has been told anything else."""
        return (
            self._config.use_push
            and passage.step.hidden_states.nbytes <= MAX_PUSHED_BYTES
            and before.hop.peer_id != link.hop.peer_id
            and before.dtype == link.dtype
            and before.can_push
            and link.can_push
            and before.sent_step_id != passage.step_id
            and link.announced_step_id != passage.step_id
            and self._pool.can_push(before.hop.peer_id, link.hop.peer_id)
        )

    @contextmanager
    def _failing(self, link: Link) -> Iterator[None]:
        try:
            yield
        except (RemoteError, NetworkError, RequestRefused) as error:
            self.drop([link, *(self._fed_by(link) if isinstance(error, RemoteError) else ())])
            raise HopFailed(link.hop, error) from error

    def _fed_by(self, liar: Link) -> list[Link]:
        """Links that may have run what a server handed on that has been found wrong since."""
        following = self.links[self.links.index(liar) + 1 :]
        return [link for link in following if link.owes_an_answer]

    async def _pass_through(self, turn: Turn, passage: Passage, history: InputHistory | None = None) -> None:
        """Takes the step through one link, whose input has been reached, and keeps the input in the history."""
        link, step = turn.link, passage.step
        asked_at_s = trio.current_time()
        if turn.pusher is None:
            await link.send(passage.whole_step(link, turn.next_link))
        if history is not None:  # while the server computes
            start = link.hop.span.start
            history.put(start, step.position, passage.states[start])
        reply = await self._reply(turn, passage)
        self._pool.step_times(link.hop).note(step.num_tokens_in_total, trio.current_time() - asked_at_s)
        passage.take(link, reply)

    async def _reply(self, turn: Turn, passage: Passage) -> StepReply:
        """The link's answer. A server that is late is asked whether it is alive; one that is only busy gets longer."""
        link, pusher, asked_at_s = turn.link, turn.pusher, trio.current_time()
        hop, num_tokens = link.hop, passage.step.num_tokens_in_total
        times = self._pool.step_times(hop)
        declared_s = link.declared_s(passage.step, self._pool.round_trip_s(hop.peer_id))
        reply = None
        if pusher is not None:
            patience_s = max(MIN_PUSH_PATIENCE_S, PUSH_PATIENCE * times.expected_s(num_tokens, declared_s))
            reply = await link.reply_within(patience_s)
            if reply is None:
                await link.send(passage.whole_step(link, turn.next_link))
        if reply is None:
            late_after_s = times.late_after_s(num_tokens, declared_s, self._config.min_step_timeout_s)
            reply = await link.reply_within(min(late_after_s, self._config.timeout_s(num_tokens)))
        if reply is None and await self._pool.is_alive(hop.peer_id):
            reply = await link.reply_within(self._config.timeout_s(num_tokens))
        if reply is None:
            waited_s = trio.current_time() - asked_at_s
            raise DeadlineExceeded(f"no answer to a step of {num_tokens} tokens within {waited_s:.1f} s", hop.peer_id)
        if pusher is not None:
            self._pool.note_push(pusher.hop.peer_id, hop.peer_id, arrived=reply.from_push)
        return reply
