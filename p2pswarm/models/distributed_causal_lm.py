"""What a causal language model of transformers can do in addition when its blocks are in a swarm.

`DistributedCausalLM` is mixed in front of the model's own class, so that `isinstance`, `forward` and `generate`, with
all its options, stay transformers'.
"""

from collections.abc import Callable
from contextlib import ExitStack
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import torch
from transformers import PreTrainedModel

from p2pswarm.blocks.client_model import SwarmCache
from p2pswarm.client.dispatch import activated, active_session
from p2pswarm.client.distributed_model import DistributedModel
from p2pswarm.client.generation import generate_in_session
from p2pswarm.client.portal import Portal
from p2pswarm.client.swarm import Swarm
from p2pswarm.models.inference_session import InferenceSession

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Connection:
    """The model's place in the swarm."""

    portal: Portal
    swarm: Swarm
    model: DistributedModel


_own_sessions: ContextVar[ExitStack | None] = ContextVar("own_sessions", default=None)
"""Of the `generate` that runs in this context outside of any session."""


class DistributedCausalLM:
    """Sessions, and `generate` through them."""

    connection: Connection

    def inference_session(self, *, max_length: int, adapter: str | None = None) -> InferenceSession:
        """A session for up to `max_length` tokens, prompts and answers together.

            with model.inference_session(max_length=1024) as session:
                model.generate(first_prompt, max_new_tokens=50)
                model.generate(more_text, max_new_tokens=50)  # goes on from there

        `session.position` tells and sets how many tokens count. Room at the servers is asked for at the first step.
        `adapter`: the name or id of a LoRA adapter, by default that which `from_pretrained` was given.
        """
        return InferenceSession(self.connection.portal, self.connection.model, max_length, adapter)

    def generate(
        self, inputs: torch.Tensor | None = None, *, session: InferenceSession | None = None, **options: Any
    ) -> Any:
        """transformers' `generate`. In a session, `inputs` are the new tokens only, and so begins what is returned.

        The session is the one given, or that of the `with` around; without any, one is opened for this call.
        """
        if inputs is None:
            inputs = options.pop("input_ids", None)
        model: Any = self
        generate: Callable[..., Any] = super().generate  # type: ignore[misc]  # of the model class we are mixed into
        active = session.active if session is not None else active_session()
        if active is not None:
            with activated(active):
                return generate_in_session(model, generate, active.session, inputs, options)
        with ExitStack() as own_sessions:
            token = _own_sessions.set(own_sessions)
            own_sessions.callback(_own_sessions.reset, token)
            return generate(inputs, **options)

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """transformers' hook for making a cache: the place where the length of a generation is known."""
        own_sessions = _own_sessions.get()
        if own_sessions is not None and generation_config.use_cache and model_kwargs.get("past_key_values") is None:
            session = own_sessions.enter_context(self.inference_session(max_length=max_cache_length + 1))
            assert session.position == 0
            model_kwargs["past_key_values"] = SwarmCache()
        super()._prepare_cache_for_generation(  # type: ignore[misc]  # of the model class we are mixed into
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )

    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The checkpoint's own."""
        return self.connection.model.tokenizer

    def close(self) -> None:
        """Leaves the swarm. Happens by itself when the model is collected and when the program ends."""
        self.connection.portal.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def distributed(shell: PreTrainedModel, connection: Connection) -> PreTrainedModel:
    """The same object, with `DistributedCausalLM` in front of its class."""
    own_class = type(shell)
    shell.__class__ = type(own_class.__name__, (DistributedCausalLM, own_class), {"__module__": own_class.__module__})
    shell.connection = connection  # type: ignore[assignment]  # not a module nor a tensor
    return shell
