"""A forward pass through the swarm without a session: nothing is remembered, neither at the servers nor here.

It is `client/training.py` without the way back.
"""

import torch

from p2pswarm.client.config import ClientConfig
from p2pswarm.client.local_blocks import LocalBlocks
from p2pswarm.client.model_servers import ModelServers
from p2pswarm.client.step_input import StepInput
from p2pswarm.client.training import TrainingPass
from p2pswarm.client.tuning import Tuning
from p2pswarm.core.span import Span
from p2pswarm.rpc.client import RpcClient


class ForwardPass:
    """Runs whole batches through blocks, over servers drawn by their capacity, so that calls spread."""

    def __init__(
        self, servers: ModelServers, rpc: RpcClient, config: ClientConfig, local: LocalBlocks | None = None
    ) -> None:
        self.training = TrainingPass(servers, rpc, config, local)

    async def run(
        self, batch: StepInput, adapter: str | None = None, tuning: Tuning | None = None, blocks: Span | None = None
    ) -> torch.Tensor:
        """The hidden states [batch, tokens, hidden] after the last of `blocks` (all of the model's), through the
        adapter of that name or id or the config's. Raises as `Session.step` does, and `AdapterNotFound`."""
        output, _ = await self.training.forward(batch, tuning, adapter, blocks, keeps_trail=False)
        return output
