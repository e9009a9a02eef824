"""What a model finds when it calls for its blocks: the session that is active in this thread, or a pass without one.

The model is blocking code in some thread, sessions live in a trio loop; `Call` is the way from the one to the other.
"""

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TypeVar, TypeVarTuple

import torch
import trio

from p2pswarm.blocks.client_model import BlocksCall
from p2pswarm.client.autograd import BlocksPass, Call, run_differentiably
from p2pswarm.client.forward import ForwardPass
from p2pswarm.client.session import Session
from p2pswarm.client.step_input import StepInput
from p2pswarm.client.tuning import Tuning
from p2pswarm.core.errors import ConfigError, SessionClosed

T = TypeVar("T")
Args = TypeVarTuple("Args")


def calls_into_loop() -> Call:
    """The way into the running loop from any thread: from trio's own, whose cancellation goes along, and from others,
    such as one that somebody's training runs in.

    Called in the loop itself, which it would block for ever, it raises `ConfigError`.
    """
    token = trio.lowlevel.current_trio_token()

    def call(function: Callable[[*Args], Awaitable[T]], *args: *Args) -> T:
        if trio.lowlevel.in_trio_task():
            raise ConfigError(
                "blocks in the swarm were called in the trio loop, which waits for nobody: run the model, and "
                "backward(), by trio.to_thread.run_sync"
            )
        try:
            return trio.from_thread.run(function, *args, trio_token=None if _is_trios_own_thread() else token)
        except trio.RunFinishedError as error:
            raise SessionClosed("the connection to the swarm is closed: load the model again") from error

    return call


def _is_trios_own_thread() -> bool:
    try:
        trio.from_thread.check_cancelled()
    except RuntimeError:
        return False
    return True


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

    def __init__(self, forward_pass: ForwardPass, call: Call) -> None:
        self.tuning: Callable[[], Tuning | None] = lambda: None
        """What passes bring along that no session is around; asked at each pass, so that training shows in the next."""
        self.forward_pass = forward_pass
        self._call = call

    def __call__(self, call: BlocksCall) -> torch.Tensor:
        step = _step_input(call)
        active = active_session()
        if call.cache is None:
            if active is not None:
                return self.run(BlocksPass(step, active.session.tuning, active.session.adapter))
            return self.run(BlocksPass(step, self.tuning()))
        if active is None:
            raise ConfigError("a forward pass with a cache needs a session: call it inside model.inference_session()")
        result: torch.Tensor = active.call(active.session.step, step)
        return result

    def run(self, blocks_pass: BlocksPass) -> torch.Tensor:
        """The hidden states after the blocks; differentiable where anything that goes in is. Blocking."""
        if blocks_pass.wants_gradients:
            return run_differentiably(self.forward_pass.training, self._call, blocks_pass)
        plain = blocks_pass.detached()
        result: torch.Tensor = self._call(self.forward_pass.run, plain.batch, plain.adapter, plain.tuning, plain.blocks)
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
