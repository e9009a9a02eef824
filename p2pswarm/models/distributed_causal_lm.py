"""What a causal language model of transformers can do in addition when its blocks are in a swarm.

`DistributedCausalLM` is mixed in front of the model's own class, so that `isinstance`, `forward` and `generate`, with
all its options, stay transformers'.
"""

from collections.abc import Callable
from contextlib import ExitStack
from contextvars import ContextVar
from typing import Any

import torch
from transformers import PreTrainedModel

from p2pswarm.blocks.client_model import SwarmCache
from p2pswarm.client.dispatch import activated, active_session
from p2pswarm.client.generation import generate_in_session
from p2pswarm.models.distributed_shell import Connection, DistributedShell
from p2pswarm.models.inference_session import InferenceSession
from p2pswarm.models.tuning.options import TuningOptions

_own_sessions: ContextVar[ExitStack | None] = ContextVar("own_sessions", default=None)
"""Of the `generate` that runs in this context outside of any session."""


class DistributedCausalLM(DistributedShell):
    """`generate` through sessions."""

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


def distributed(
    shell: PreTrainedModel,
    connection: Connection,
    options: TuningOptions | None = None,
    base_model: str | None = None,
) -> PreTrainedModel:
    """The same object, with `DistributedCausalLM`, or for a model that cannot generate `DistributedShell`, in front of
    its class; what `options` say begins to be tuned. `base_model` is what peft is told of where the whole model is.

    Raises `ConfigError` where the options do not fit the model.
    """
    own_class = type(shell)
    mixin = DistributedCausalLM if shell.can_generate() else DistributedShell
    shell.__class__ = type(own_class.__name__, (mixin, own_class), {"__module__": own_class.__module__})
    assert isinstance(shell, DistributedShell)
    shell.connection = connection
    shell.prepare_tuning(connection.model, options, base_model or connection.model.checkpoint.name)
    return shell
