"""A loaded model whose blocks are in the swarm, for async programs: sessions, and forward passes without one."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import cached_property
from typing import TYPE_CHECKING

import torch
import trio
from transformers import PreTrainedModel

from p2pswarm.blocks.architecture import Head
from p2pswarm.blocks.client_model import blocks_of
from p2pswarm.checkpoint.checkpoint import Checkpoint
from p2pswarm.client.carried import Carried, CarriedSource, nothing_carried
from p2pswarm.client.config import ClientConfig
from p2pswarm.client.dispatch import BlocksDispatch, active_session
from p2pswarm.client.forward import ForwardPass
from p2pswarm.client.generation import GeneratingSession
from p2pswarm.client.local_adapter import LocalAdapter, is_local_adapter, read_local_adapter
from p2pswarm.client.local_blocks import LocalBlocks, check_adapter
from p2pswarm.client.model_servers import ModelServers
from p2pswarm.client.single_error import single_error
from p2pswarm.client.step_input import StepInput
from p2pswarm.client.tuning import Tuning
from p2pswarm.core.errors import ConfigError
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
        adapter: LocalAdapter | None = None,
        head: Head = Head.CAUSAL_LM,
        local: LocalBlocks | None = None,
    ) -> None:
        """`adapter`: what sessions and passes carry along that are not given anything else. `local`: the blocks that
        are run here and not at servers."""
        self.checkpoint = checkpoint
        self.shell = shell
        """transformers' own model class: embeddings, final norm and head here, blocks in the swarm."""
        self.servers = servers
        self.dispatch = dispatch
        """How the shell, and other blocking code, comes to its blocks."""
        self.carried: CarriedSource = nothing_carried if adapter is None else adapter.carried
        """Asked for each session and each pass without one; whoever trains the model puts in what is trained."""
        dispatch.tuning = self._tuning
        blocks_of(shell).prefix = self._prefix
        self._forward_pass = forward_pass
        self._rpc = rpc
        self._config = config
        self.head = head
        self._local = local

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

        `adapter` may also be a folder here, which the session carries along. Without one and without a tuning, it
        carries what the model does. Its servers are asked for room at the first step. They forget it when the context
        is left. Raises `AdapterNotFound`, `ConfigError` where several adapters go by the name, `CheckpointError` for a
        folder that does not fit the model.
        """
        adapter_id = None
        if adapter is not None and is_local_adapter(adapter):
            carried = await self._read_along(adapter, tuning)
        else:
            adapter_id = await self.servers.find_adapter(adapter)
            check_adapter(self._local, adapter_id)
            carried = self.carried() if tuning is None and adapter is None else Carried(tuning=tuning)
        with single_error():
            async with trio.open_nursery() as nursery:
                session = GeneratingSession(
                    self.shell,
                    self.servers,
                    self._rpc,
                    self._config,
                    max_length=max_length,
                    adapter=adapter_id,
                    tuning=carried.tuning,
                    prefix=carried.prefix,
                    nursery=nursery,
                    local=self._local,
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

    async def _read_along(self, folder: str, tuning: Tuning | None) -> Carried:
        active = self._config.active_adapter
        if tuning is not None or active is not None:
            other = "a tuning" if tuning is not None else f"the servers' {active}"
            raise ConfigError(f"a session goes through the adapter in {folder} or through {other}, not through both")
        adapter = await trio.to_thread.run_sync(read_local_adapter, folder, self.checkpoint, self.head)
        return adapter.carried()

    def _tuning(self) -> Tuning | None:
        return self.carried().tuning

    def _prefix(self) -> torch.Tensor | None:
        active = active_session()
        return self.carried().prefix if active is None else active.session.prefix
