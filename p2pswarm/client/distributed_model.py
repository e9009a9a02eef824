"""A loaded model whose blocks are in the swarm, for async programs: sessions, and forward passes without one."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import cached_property
from typing import TYPE_CHECKING

import torch
import trio
from transformers import PreTrainedModel

from p2pswarm.checkpoint.checkpoint import Checkpoint
from p2pswarm.client.config import ClientConfig
from p2pswarm.client.dispatch import BlocksDispatch
from p2pswarm.client.forward import ForwardPass
from p2pswarm.client.generation import GeneratingSession
from p2pswarm.client.model_servers import ModelServers
from p2pswarm.client.single_error import single_error
from p2pswarm.client.step_input import StepInput
from p2pswarm.client.tuning import Tuning
from p2pswarm.core.ids import ModelId
from p2pswarm.rpc.client import RpcClient

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class DistributedModel:
    """Made by `Swarm.load`. Any number of sessions can be open at once."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        shell: PreTrainedModel,
        servers: ModelServers,
        forward_pass: ForwardPass,
        dispatch: BlocksDispatch,
        rpc: RpcClient,
        config: ClientConfig,
    ) -> None:
        self.checkpoint = checkpoint
        self.shell = shell
        """transformers' own model class: embeddings, final norm and head here, blocks in the swarm."""
        self.servers = servers
        self.dispatch = dispatch
        """How the shell, and other blocking code, comes to its blocks."""
        self._forward_pass = forward_pass
        self._rpc = rpc
        self._config = config

    @property
    def model_id(self) -> ModelId:
        return self.servers.facts.model_id

    @cached_property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The checkpoint's own. Read from disk the first time."""
        return self.checkpoint.tokenizer()

    @asynccontextmanager
    async def session(
        self, *, max_length: int, adapter: str | None = None, tuning: Tuning | None = None
    ) -> AsyncIterator[GeneratingSession]:
        """A session for up to `max_length` tokens a sequence, prompts and answers together, by an adapter's name or id
        through that adapter (by default `ClientConfig.active_adapter`), and through a tuning as it is now.

        Its servers are asked for room at the first step. They forget it when the context is left. Raises
        `AdapterNotFound`, or `ConfigError` where several adapters go by the name.
        """
        adapter_id = await self.servers.find_adapter(adapter)
        with single_error():
            async with trio.open_nursery() as nursery:
                session = GeneratingSession(
                    self.shell,
                    self.servers,
                    self._rpc,
                    self._config,
                    max_length=max_length,
                    adapter=adapter_id,
                    tuning=tuning,
                    nursery=nursery,
                )
                try:
                    yield session
                finally:
                    session.close()
                    nursery.cancel_scope.cancel()

    async def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        *,
        adapter: str | None = None,
        tuning: Tuning | None = None,
    ) -> torch.Tensor:
        """`hidden_states` [batch, tokens, hidden] through all blocks, remembering nothing; `adapter` and `tuning` as in
        `session`."""
        batch = StepInput(hidden_states, 0, attention_mask=attention_mask, position_ids=position_ids)
        return await self._forward_pass.run(batch, adapter, tuning)
