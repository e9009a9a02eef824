"""What a model finds when it calls for its blocks: the session that is active in this thread, or a plain forward pass.

The model is blocking code in some thread, sessions live in a trio loop; `Call` is the way from the one to the other.
"""

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import trio

from p2pswarm.blocks.client_model import BlocksCall
from p2pswarm.client.session import Session
from p2pswarm.client.step_input import StepInput
from p2pswarm.core.errors import ConfigError

Call = Callable[..., Any]
"""`call(async_function, *args)` from a thread beside the loop: `trio.from_thread.run`, or `Portal.call`."""


@dataclass(frozen=True, slots=True)
class ActiveSession:
    """The session that takes the steps of the code running in this context."""

    session: Session
    call: Call


_active: ContextVar[ActiveSession | None] = ContextVar("active_session", default=None)


def active_session() -> ActiveSession | None:
    """The innermost one of this thread's context."""
    return _active.get()


@contextmanager
def activated(active: ActiveSession) -> Iterator[None]:
    """Within, the model's cached steps go to this session."""
    token = _active.set(active)
    try:
        yield
    finally:
        _active.reset(token)


class BlocksDispatch:
    """The `run_blocks` of a client model."""

    def __init__(
        self, forward: Callable[[StepInput, str | None], Awaitable[torch.Tensor]], call: Call = trio.from_thread.run
    ) -> None:
        """`forward` is told the adapter of the session around the pass, if there is one."""
        self._forward = forward
        self._call = call

    def __call__(self, call: BlocksCall) -> torch.Tensor:
        step = _step_input(call)
        active = active_session()
        if call.cache is None:
            adapter = None if active is None else active.session.adapter
            result: torch.Tensor = self._call(self._forward, step, adapter)
            return result
        if active is None:
            raise ConfigError("a forward pass with a cache needs a session: call it inside model.inference_session()")
        result = active.call(active.session.step, step)
        return result


def _step_input(call: BlocksCall) -> StepInput:
    """The call, with the mask cut to the new tokens: the servers remember the rest."""
    num_tokens = call.hidden_states.shape[1]
    mask = None if call.attention_mask is None else call.attention_mask[:, -num_tokens:]
    if mask is not None and bool(mask.all()):
        mask = None
    return StepInput(call.hidden_states, call.position, mask, _long(call.position_ids), _long(call.beam_indices))


def _long(indices: torch.Tensor | None) -> torch.Tensor | None:
    """As they travel; beam search makes int32."""
    return None if indices is None else indices.to(torch.int64)
