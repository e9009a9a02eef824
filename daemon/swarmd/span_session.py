"""One client's session on this server: its KV cache, what of it is padding, and the steps it takes.

A step is checked whole before it changes anything, so a refused step leaves the session as it was. After any other
error the session is over: `rpc/server.py` closes it, and its client starts anew elsewhere.
"""

from collections.abc import Callable
from functools import partial

import torch

from p2pswarm.blocks.kv_cache import SpanCache
from p2pswarm.blocks.span_model import PreparedStep, SpanModel
from p2pswarm.wire.codecs import encode_tensor
from p2pswarm.wire.messages import OpenSession, Step, StepReply, WireTensor
from swarmd import checks
from swarmd.device_thread import Device


class SpanSession:
    """The steps of one session; `close` gives its room back."""

    def __init__(
        self,
        model: SpanModel,
        device: Device,
        request: OpenSession,
        *,
        max_position: int,
        release: Callable[[], None],
    ) -> None:
        self._model = model
        self._device = device
        self._request = request
        self._max_position = max_position
        self._release = release
        self._cache: SpanCache | None = None
        """Made by the first step, on the device's thread."""
        self._prepared: PreparedStep | None = None
        """For the next token, if it follows the last one; made while the device has nothing else to do."""
        self._padding = Padding(request.batch_size, request.max_length)
        self._length = 0

    async def step(self, step: Step) -> StepReply:
        """Runs the step's tokens. Raises `BadRequest`, and nothing has changed.

        With `CodecError`, which only the answer can show, the step has been taken; the client may repeat it.
        """
        checks.check_step(
            step,
            batch_size=self._request.batch_size,
            length=self._length,
            max_length=self._request.max_length,
            hidden_size=self._model.hidden_size,
        )
        hidden_states = await self._device.run(partial(self._compute, step), afterwards=self._prepare)
        return StepReply(step.step_id, self._length, hidden_states)

    async def close(self) -> None:
        """Forgets the cache and gives its room back."""
        self._cache = self._prepared = None
        self._release()

    def _compute(self, step: Step) -> WireTensor:
        """On the device's thread: the checks of the values, then the changes."""
        sent = checks.read_hidden_states(step.hidden_states)
        mask = checks.read_mask(step.attention_mask)
        position_ids = checks.read_position_ids(step.position_ids, self._max_position)
        beam_indices = checks.read_beam_indices(step.beam_indices, self._request.batch_size)

        if self._cache is None:
            request = self._request
            self._cache = self._model.new_cache(request.batch_size, request.span, max_length=request.max_length)
        self._cache.crop(step.position)
        if beam_indices is not None:
            self._cache.reorder(beam_indices)
            self._padding.reorder(beam_indices)
        self._padding.extend(step.position, step.num_tokens, mask)
        answer = self._run(sent, self._cache, step.position, position_ids) if step.num_tokens else sent
        self._length = step.position + step.num_tokens
        return encode_tensor(answer, self._request.codec)

    def _run(
        self, sent: torch.Tensor, cache: SpanCache, position: int, position_ids: torch.Tensor | None
    ) -> torch.Tensor:
        prepared, self._prepared = self._prepared, None
        answer = self._model.run(
            sent,
            cache,
            position=position,
            attention_mask=self._padding.mask(position + sent.shape[1]),
            position_ids=position_ids,
            blocks=self._request.span,
            prepared=prepared,
        )
        return answer.to(sent.dtype)

    def _prepare(self) -> None:
        """On the device's thread, when the answer is on its way."""
        cache = self._cache
        has_padding = self._padding.mask(self._length) is not None
        if cache is not None and self._prepared is None and not has_padding and self._length < self._request.max_length:
            self._prepared = self._model.prepare(cache, self._request.span)


class Padding:
    """Which tokens of a session count. Costs nothing until the first token that does not."""

    def __init__(self, batch_size: int, max_length: int) -> None:
        self._batch_size = batch_size
        self._max_length = max_length
        self._counts: torch.Tensor | None = None
        """bool [batch, max_length]; None while all tokens count."""

    def extend(self, position: int, num_tokens: int, counts: torch.Tensor | None) -> None:
        """Notes the tokens from `position` on; `counts` is bool [batch, tokens], None if all of them count."""
        if self._counts is None:
            if counts is None:
                return
            self._counts = torch.ones(self._batch_size, self._max_length, dtype=torch.bool)
        self._counts[:, position : position + num_tokens] = True if counts is None else counts

    def reorder(self, beam_indices: torch.Tensor) -> None:
        if self._counts is not None:
            self._counts = self._counts[beam_indices]

    def mask(self, length: int) -> torch.Tensor | None:
        """bool [batch, length] for the first `length` tokens; None if all of them count."""
        return None if self._counts is None else self._counts[:, :length]
