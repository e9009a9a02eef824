"""What runs next on the device, and how much of it: a pure policy, without torch and without tasks.

Each time the device is free, `Scheduler.next` picks one part of the work that waits:

- **Decode steps** of all sessions run as one batch, whoever waits at that moment. Reading the weights is most of a
  step's cost, so a batch of eight costs little more than one step. While several sessions are decoding, a step that
  comes alone is held for a moment, since the others are often right behind it. Where the processors are shared with
  other processes, for which every batch saved is time, half of the sessions are gathered: two groups then go round
  through the servers of a chain, so that one computes while the other is elsewhere. The only session never waits.
- **Prompts** run in parts, so long that those who decode wait for little more than the time of `STALL_STEPS` steps.
- **Forward and backward passes** run in parts too, and rest in between while others decode. Of a backward pass some
  rows at a time go through the blocks and back, a few blocks in each part; only of one such pass are rows under way,
  because what they have to keep takes much memory.

Between the kinds time is shared by start-time fair queueing (Goyal, Vin, Cheng 1996): each has a clock that runs slower
the larger its share, and the one whose clock is behind is next. Within a kind, the peer that had least lately is first,
and every second of waiting counts as much as one of service; so nobody waits for ever.
"""

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from p2pswarm.core.errors import ServerBusy
from swarmd.scheduling.costs import CostModel
from swarmd.scheduling.fairness import Service
from swarmd.scheduling.work import Kind, Part, Work

SHARES = {Kind.DECODE: 4, Kind.PREFILL: 2, Kind.FORWARD: 1}
"""Of the device's time, where all of them want all of it."""
STALL_STEPS = {Kind.PREFILL: 2.0, Kind.FORWARD: 2.0, Kind.BACKWARD: 1.0}
"""How long a part may be while others decode, in decode steps. A chain of three servers then takes at most two thirds
longer for a token that meets a prompt in one of them. Stages of a backward pass lose nothing by being short: sixteen
who decode through three servers, all of which train, keep 65 percent of their speed so, and 50 with twice as long ones.
"""
QUIET_STAGE_STEPS = 4.0
"""How long one stage of a backward pass may be, in decode steps, where nobody decodes when its rows begin. Who begins
to waits for such stages until these rows are through; by rows that are fewer, the pass takes a sixth longer."""
FORWARD_SHARE_WHILE_DECODING = 1 / 3
"""Of the time since a forward part began, before the next one may."""
LONG_PART_S = 0.5
"""Of a part while nobody decodes: whoever begins to waits so long, once."""
MAX_ROUND_STEPS = 8.0
"""How long a batch of decode steps may take, in single steps, where rows cost so much that batches do not pay."""
DECODING_S = 1.0
"""A session decodes as long as its last step is not longer ago."""
GATHER_GAP_STEPS, GATHER_STEPS = 0.1, 0.4
"""How long a batch is held for the next step, and in total, in decode steps."""
SHARED_GROUPS = 2
"""Into how many batches the sessions are gathered where other processes use the time. Three servers of ten blocks of
SmolLM2 and their client, on two processors, give sixteen sessions 66, 88 and 76 tokens/s in one, two and three groups;
55 where nothing is held for longer."""
SHARED_GATHER_GAP_STEPS, SHARED_GATHER_STEPS = 1.5, 3.0
"""How long such a batch is held for those who are missing: for the next one, and in total, in decode steps."""

MAX_WAITING = 256
"""Requests of all peers: sessions have one step each."""
MAX_FORWARDS_PER_PEER = 8
"""A batch of a trainer goes to many servers; more calls at one of them only wait."""


@dataclass(frozen=True, slots=True)
class SchedulerStatistics:
    """What waits at this moment."""

    num_waiting: int
    num_decoding: int
    """Sessions with a decode step within the last second."""


class Scheduler:
    """Holds what waits. `next` gives a part out, `note` takes it back when it has run; one part is out at a time."""

    def __init__(
        self,
        costs: CostModel,
        is_shared: Callable[[float], bool] = lambda now_s: False,
        *,
        max_waiting: int = MAX_WAITING,
    ) -> None:
        """`is_shared`: whether others use the time for which the device waits (`cpu_sharing.py`)."""
        self.costs = costs
        self._is_shared = is_shared
        self.service = Service()
        self.wake_at_s = math.inf
        """When to ask again though nothing came or went: something waits that may not run before."""
        self._max_waiting = max_waiting
        self._waiting: dict[Kind, list[Work]] = {kind.queue: [] for kind in Kind}
        self._clocks_s = dict.fromkeys(self._waiting, 0.0)
        self._clock_s = 0.0
        self._decoding: OrderedDict[int | None, tuple[float, int]] = OrderedDict()
        """By session: when it last took a decode step, and with how many rows; the latest last."""
        self._forward_rests_until_s = -math.inf

    @property
    def num_waiting(self) -> int:
        return sum(map(len, self._waiting.values()))

    def add(self, work: Work) -> None:
        """Takes work in. Raises `ServerBusy`."""
        if self.num_waiting >= self._max_waiting:
            raise ServerBusy(f"{self.num_waiting} requests are waiting for the device already")
        if work.kind.queue is Kind.FORWARD:
            forwards = sum(other.peer_id == work.peer_id for other in self._waiting[Kind.FORWARD])
            if forwards >= MAX_FORWARDS_PER_PEER:
                raise ServerBusy(f"{forwards} forward or backward passes of one peer wait already", work.peer_id)
        self._put(work)

    def remove(self, work: Work) -> None:
        """Forgets work that waits; what is out does not come back."""
        work.is_given_up = True
        if work in self._waiting[work.kind.queue]:
            self._waiting[work.kind.queue].remove(work)

    def forget_session(self, session: int) -> None:
        """It is over: nobody waits for its next token."""
        self._decoding.pop(session, None)

    def next(self, now_s: float) -> Part | None:
        """What to run now; None where nothing waits, or what waits is to wait until `wake_at_s`."""
        self.wake_at_s = math.inf
        self._forget_who_stopped(now_s)
        ready = [queue for queue, works in self._waiting.items() if works and self._is_ready(queue, now_s)]
        if not ready:
            return None
        queue = min(ready, key=self._clocks_s.__getitem__)
        if queue is Kind.DECODE and len(ready) == 1 and now_s < (until_s := self._gathered_at_s(now_s)):
            self.wake_at_s = min(self.wake_at_s, until_s)
            return None
        self._clock_s = self._clocks_s[queue]
        part = self._decode_batch(now_s) if queue is Kind.DECODE else self._part(queue, now_s)
        for work in part.works:
            self._waiting[queue].remove(work)
        return part

    def note(self, part: Part, took_s: float, now_s: float) -> None:
        """A part has run; what is left of it waits again."""
        kind = part.kind
        self._clocks_s[kind.queue] += took_s / SHARES[kind.queue]
        for work in part.works:
            share = work.num_rows / part.num_rows if kind is Kind.DECODE else 1.0
            self.service.note(work.peer_id, took_s * share, now_s)
            work.advance(part)
            if kind is Kind.DECODE and not work.is_given_up:
                self._decoding[work.session] = (now_s, work.num_rows)
                self._decoding.move_to_end(work.session)
        if kind is Kind.DECODE:
            if part.num_tokens:
                self.costs.note_decode(part.num_rows, took_s)
            return
        self.costs.note_part(kind, part.num_token_passes, took_s)
        if kind.queue is Kind.FORWARD:
            self._forward_rests_until_s = now_s + took_s * (1 / FORWARD_SHARE_WHILE_DECODING - 1)
        (work,) = part.works
        if not (work.is_done or work.is_given_up):
            self._put(work)

    def statistics(self, now_s: float) -> SchedulerStatistics:
        self._forget_who_stopped(now_s)
        return SchedulerStatistics(self.num_waiting, len(self._decoding))

    def _put(self, work: Work) -> None:
        queue = work.kind.queue
        if not self._waiting[queue]:
            self._clocks_s[queue] = max(self._clocks_s[queue], self._clock_s)
        self._waiting[queue].append(work)

    def _is_ready(self, queue: Kind, now_s: float) -> bool:
        if queue is not Kind.FORWARD or not self._decoding or now_s >= self._forward_rests_until_s:
            return True
        last_step_s, _ = next(reversed(self._decoding.values()))
        self.wake_at_s = min(self._forward_rests_until_s, last_step_s + DECODING_S)
        return False

    def _forget_who_stopped(self, now_s: float) -> None:
        while self._decoding:
            session, (last_step_s, _) = next(iter(self._decoding.items()))
            if now_s - last_step_s < DECODING_S:
                return
            del self._decoding[session]

    def _gathered_at_s(self, now_s: float) -> float:
        """Until when a batch is held for the steps of others who decode."""
        waiting = self._waiting[Kind.DECODE]
        if len(waiting) >= self._group_size(now_s) or self._decoding.keys() <= {work.session for work in waiting}:
            return -math.inf
        gap_steps, steps = GATHER_GAP_STEPS, GATHER_STEPS
        if self._is_shared(now_s):
            gap_steps, steps = SHARED_GATHER_GAP_STEPS, SHARED_GATHER_STEPS
        arrived_s = [work.arrived_s for work in waiting]
        return min(max(arrived_s) + gap_steps * self.costs.step_s, min(arrived_s) + steps * self.costs.step_s)

    def _group_size(self, now_s: float) -> float:
        """How many sessions are to decode together."""
        if not self._is_shared(now_s):
            return math.inf
        sessions = self._decoding.keys() | {work.session for work in self._waiting[Kind.DECODE]}
        return -(-len(sessions) // SHARED_GROUPS)

    def _decode_batch(self, now_s: float) -> Part:
        first, *others = sorted(self._waiting[Kind.DECODE], key=lambda work: self._urgency_s(work, now_s))
        works, num_rows = [first], first.num_rows
        group_size = self._group_size(now_s)
        max_rows = self.costs.rows_within(MAX_ROUND_STEPS * self.costs.step_s)
        for work in others:
            is_alike = first.batch_key is not None and work.batch_key == first.batch_key
            if is_alike and len(works) < group_size and num_rows + work.num_rows <= max_rows:
                works.append(work)
                num_rows += work.num_rows
        return Part(tuple(works), num_rows, first.num_tokens)

    def _part(self, queue: Kind, now_s: float) -> Part:
        """As much of a prompt, a forward or a backward pass as may run now."""
        work = min(self._may_go_on(queue), key=lambda work: self._urgency_s(work, now_s))
        others = [num_rows for session, (_, num_rows) in self._decoding.items() if session != work.session]
        time_s = STALL_STEPS[work.kind] * self.costs.decode_s(sum(others)) if others else LONG_PART_S
        max_tokens = self.costs.tokens_within(work.kind, time_s)
        tokens_left = work.num_tokens - work.tokens_done
        if work.kind is Kind.BACKWARD:
            quiet_s = QUIET_STAGE_STEPS * self.costs.step_s or LONG_PART_S  # nobody ever decoded
            return _stages(work, max_tokens, self.costs.tokens_within(work.kind, min(time_s, quiet_s)))
        if work.kind is Kind.PREFILL:
            return Part((work,), work.num_rows, _even_part(tokens_left, max_tokens // work.num_rows))
        if not work.tokens_done and work.num_tokens <= max_tokens:
            return Part((work,), _even_part(work.num_rows - work.rows_done, max_tokens // work.num_tokens), tokens_left)
        return Part((work,), 1, _even_part(tokens_left, max_tokens))

    def _may_go_on(self, queue: Kind) -> list[Work]:
        """All that wait, but backward passes only once no other one has rows under way."""
        works = self._waiting[queue]
        begun = next((work for work in works if work.rows_begun), None)
        return [work for work in works if begun is None or work is begun or work.kind is not Kind.BACKWARD]

    def _urgency_s(self, work: Work, now_s: float) -> float:
        """The lowest is first."""
        return self.service.used_s(work.peer_id, now_s) - (now_s - work.arrived_s)


def _stages(work: Work, max_tokens: int, stage_tokens: int) -> Part:
    """The next stages of a backward pass: so many that they take no longer than a pass of `max_tokens`.

    Rows that begin are so many that one stage of them takes no longer than a pass of `stage_tokens`.
    """
    num_rows = work.rows_begun
    row_tokens = work.num_tokens * work.stage_passes
    if not num_rows:
        most = int(stage_tokens / row_tokens)
        num_rows = _even_part(work.num_rows - work.rows_done, min(most, work.max_rows or most))
    most_stages = max(1, int(max_tokens / (num_rows * row_tokens)))
    return Part((work,), num_rows, work.num_tokens, min(most_stages, work.num_stages - work.stages_done))


def _even_part(left: int, most: int) -> int:
    """The size of the next part, where all that is left goes in parts of about the same size, `most` at most."""
    num_parts = -(-left // max(1, most))
    return -(-left // num_parts)
