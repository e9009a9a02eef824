"""A session for blocking programs: the async one, behind a portal. Within `with`, the model's `generate` uses it."""

from contextlib import ExitStack
from typing import Self

import torch

from p2pswarm.client.dispatch import ActiveSession, activated
from p2pswarm.client.distributed_model import DistributedModel
from p2pswarm.client.generation import GeneratingSession
from p2pswarm.client.portal import Portal
from p2pswarm.client.step_input import StepInput
from p2pswarm.core.errors import ConfigError, SessionClosed
from p2pswarm.routing.route import Route


class InferenceSession:
    """Made by `model.inference_session`. Opened by `with`, or by hand: then `close` it and pass it as `session=`."""

    def __init__(self, portal: Portal, model: DistributedModel, max_length: int, adapter: str | None = None) -> None:
        self.model = model
        self._portal = portal
        self._entered = portal.enter(model.session(max_length=max_length, adapter=adapter))
        self._within = ExitStack()

    def __enter__(self) -> Self:
        self._within.enter_context(activated(self.active))
        return self

    def __exit__(self, *_: object) -> None:
        self._within.close()
        self.close()

    def close(self) -> None:
        """Frees the servers' caches. A second call does nothing."""
        try:
            self._entered.leave()
        except SessionClosed:
            return  # the whole connection is closed already, and this session with it

    @property
    def active(self) -> ActiveSession:
        return ActiveSession(self._session, self._portal.call)

    @property
    def _session(self) -> GeneratingSession:
        return self._entered.value

    @property
    def max_length(self) -> int:
        return self._session.max_length

    @property
    def position(self) -> int:
        """Tokens in the servers' caches. Set it to a smaller number to go back: what came after is forgotten."""
        return self._session.position

    @position.setter
    def position(self, position: int) -> None:
        self._session.position = position

    @property
    def token_ids(self) -> torch.Tensor | None:
        """[rows, tokens] that `generate` goes on from; None where there are none."""
        history = self._session.history
        return None if history is None else history.token_ids

    @property
    def route(self) -> Route | None:
        """Its servers; None before the first step."""
        return self._session.route

    def step(
        self,
        hidden_states: torch.Tensor,
        *,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        beam_indices: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Runs `hidden_states` [batch, tokens, hidden] through all blocks, after what the session holds."""
        if self._session.prefix is not None:
            raise ConfigError("a session with a tuned prompt takes tokens, in front of which it goes: use generate")
        step = StepInput(hidden_states, self.position, attention_mask, position_ids, beam_indices)
        return self._portal.call(self._session.step, step)
