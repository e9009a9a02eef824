"""One session's share of the blocks that the client keeps: it runs before the first server and after the last one.

What a server remembers of a session is remembered here too: keys, values, and which tokens are padding. What went into
the blocks is kept as well. Rows that changed places in a step that failed cannot change back; then the keys and values
are made anew, as a stand-in's are.
"""

import sys
from dataclasses import replace
from functools import partial

import torch

from p2pswarm.blocks.kv_cache import SpanCache
from p2pswarm.client.input_history import Before, InputHistory
from p2pswarm.client.local_blocks import LocalBlocks, LocalPart
from p2pswarm.client.step_input import StepInput
from p2pswarm.client.tuning import Tuning


class LocalSession:
    """For a fixed number of rows; used by one task at a time. A step enters, then leaves; or it is given up."""

    def __init__(self, blocks: LocalBlocks, batch_size: int, max_length: int, tuning: Tuning | None) -> None:
        self._history = InputHistory(batch_size, max_length, max_bytes=sys.maxsize)
        self._first = _End(blocks.first, self._history, max_length, tuning)
        self._last = _End(blocks.last, self._history, max_length, tuning)

    def before(self, step: StepInput) -> Before:
        """For `give_up`."""
        return self._history.before(step)

    async def enter(self, step: StepInput) -> StepInput:
        """The step as servers get it: after the first blocks."""
        self._history.begin(step)
        return replace(step, hidden_states=await self._first.run(step))

    async def leave(self, step: StepInput, hidden_states: torch.Tensor) -> torch.Tensor:
        """What comes out of the model, by what came from the last server in this step."""
        output = await self._last.run(replace(step, hidden_states=hidden_states))
        self._history.commit(step.end)
        return output

    def give_up(self, before: Before, *, rows_moved: bool) -> None:
        """As it was before the step that `before` came from, but for going back to its position."""
        self._history.give_up(before)
        if rows_moved:
            self._first.forget()
            self._last.forget()


class _End:
    """The session in one of the two parts."""

    def __init__(self, part: LocalPart, history: InputHistory, max_length: int, tuning: Tuning | None) -> None:
        self._part = part
        self._model = part.model
        self._history = history
        self._max_length = max_length
        own = None if tuning is None else tuning.of_blocks(part.span)
        self._tuning = None if own is None else part.model.fit_tuning(own)
        self._cache: SpanCache | None = None

    async def run(self, step: StepInput) -> torch.Tensor:
        """The step's hidden states after the blocks. The history has begun the step."""
        return await self._part.run(partial(self._run, step))

    def forget(self) -> None:
        """Lets go of keys and values; the next step makes them anew."""
        self._cache = None

    def _run(self, step: StepInput) -> torch.Tensor:
        """In the thread."""
        cache, beams = self._cache, step.beam_indices
        if cache is None:
            cache, beams = self._filled(step), None
            self._cache = cache
        cache.make_room(step.position, step.num_tokens, None if beams is None else beams.tolist())
        self._history.put(self._model.span.start, step.position, step.hidden_states)
        return self._through(cache, step)

    def _filled(self, step: StepInput) -> SpanCache:
        """A new cache, of what came before the step; its inputs have followed the step's beams already."""
        cache = self._model.new_cache(step.batch_size, max_length=self._max_length)
        if step.position:
            self._through(cache, self._history.replay(self._model.span.start))
        return cache

    def _through(self, cache: SpanCache, step: StepInput) -> torch.Tensor:
        if not step.num_tokens:
            return step.hidden_states
        output = self._model.run(
            step.hidden_states,
            cache,
            position=step.position,
            attention_mask=self._history.mask(step.end),
            position_ids=step.position_ids,
            tuning=self._tuning,
        )
        return output.to(step.hidden_states.dtype, copy=True)  # not of inference mode
