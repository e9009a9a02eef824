"""The async way in: a swarm to be a client of, and models loaded over it. Blocking programs start at `models/auto.py`.

async with open_swarm(["/ip4/192.0.2.7/tcp/31337/p2p/12D3KooW..."]) as swarm:
    model = await swarm.load("HuggingFaceTB/SmolLM2-135M-Instruct")
    async with model.session(max_length=256) as session:
        async for token_id in session.generate(prompt_token_ids, max_new_tokens=64):
            ...
"""

from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path

import torch
import trio
from transformers import PreTrainedModel

from p2pswarm.blocks.architecture import Head
from p2pswarm.blocks.client_model import load_client_model
from p2pswarm.checkpoint.checkpoint import Checkpoint, open_checkpoint
from p2pswarm.checkpoint.progress import Progress, ProgressListener
from p2pswarm.client.autograd import Call
from p2pswarm.client.config import ClientConfig
from p2pswarm.client.dispatch import BlocksDispatch, calls_into_loop
from p2pswarm.client.distributed_model import DistributedModel
from p2pswarm.client.forward import ForwardPass
from p2pswarm.client.local_adapter import is_local_adapter, read_local_adapter
from p2pswarm.client.local_blocks import LocalBlocks, load_local_blocks
from p2pswarm.client.membership import Membership, join_swarm
from p2pswarm.client.model_servers import ModelFacts, ModelServers, dtype_of
from p2pswarm.core.errors import ModelNotFound
from p2pswarm.core.ids import ModelId
from p2pswarm.directory.directory import Directory
from p2pswarm.directory.view import ModelView
from p2pswarm.net.identity import Identity
from p2pswarm.net.network import Network
from p2pswarm.net.private.swarm_key import SwarmKey
from p2pswarm.routing.bans import BanList
from p2pswarm.routing.dstar_planner import DStarLitePlanner
from p2pswarm.routing.planner import ServerFilter
from p2pswarm.rpc.client import RpcClient

FIND_AGAIN_AFTER_S = 1.0
"""A server that started together with this client has announced itself by then."""


class Swarm:
    """Models over the swarm that a client has joined; made by `open_swarm`."""

    def __init__(self, membership: Membership) -> None:
        self.membership = membership
        self.rpc = RpcClient(membership.network)

    @property
    def network(self) -> Network:
        return self.membership.network

    @property
    def directory(self) -> Directory:
        return self.membership.directory

    async def load(
        self,
        model: str,
        *,
        dtype: torch.dtype | None = None,
        revision: str | None = None,
        token: str | None = None,
        cache_dir: Path | None = None,
        listener: ProgressListener = lambda progress: None,
        call: Call | None = None,
        head: Head = Head.CAUSAL_LM,
        num_labels: int | None = None,
        seed: int = 0,
    ) -> DistributedModel:
        """The model (a folder, a hub id or a `.gguf` file) with its blocks in this swarm.

        `dtype` is that of the part that runs here; None: what most servers compute in. `listener` is told, in another
        thread, what is downloaded or converted. Cancelled, a download ends within a moment; the next one goes on from
        there. `call` is the way into this loop from the threads in which the model itself is run, by default from any.
        `num_labels` and `seed` are for the head of a sequence classifier, as in `load_client_model`.
        Raises `CheckpointError`, `UnsupportedModelError`, `ModelNotFound` when nobody serves the model.
        """

        def tell(progress: Progress) -> None:
            with suppress(RuntimeError):  # in a thread that is not this loop's, where nothing can be cancelled
                trio.from_thread.check_cancelled()
            listener(progress)

        def read() -> tuple[Checkpoint, ModelId]:
            checkpoint = open_checkpoint(model, revision=revision, token=token, cache_dir=cache_dir, listener=tell)
            return checkpoint, checkpoint.model_id

        checkpoint, model_id = await trio.to_thread.run_sync(read)
        config, adapter = self.membership.config, None
        if config.active_adapter is not None and is_local_adapter(config.active_adapter):
            adapter = await trio.to_thread.run_sync(read_local_adapter, config.active_adapter, checkpoint, head)
            config = replace(config, active_adapter=None)  # servers know nothing of it
            num_labels = num_labels or adapter.num_labels
        servers = await self._servers_of(checkpoint, model_id, config)
        dtype_here = dtype if dtype is not None else _usual_dtype(servers)
        local: LocalBlocks | None = None
        if config.local_blocks:
            local = await trio.to_thread.run_sync(load_local_blocks, checkpoint, config.local_blocks, dtype_here)
        forward_pass = ForwardPass(servers, self.rpc, config, local)
        dispatch = BlocksDispatch(forward_pass, call or calls_into_loop())

        def load_shell() -> PreTrainedModel:
            shell = load_client_model(
                checkpoint, dispatch, dtype=dtype_here, head=head, num_labels=num_labels, seed=seed
            )
            if adapter is not None:
                adapter.fill_heads(shell)
            return shell

        async with trio.open_nursery() as nursery:
            nursery.start_soon(servers.measure_round_trips)
            shell = await trio.to_thread.run_sync(load_shell)
        return DistributedModel(
            checkpoint, shell, servers, forward_pass, dispatch, self.rpc, config, adapter, head, local
        )

    async def _servers_of(self, checkpoint: Checkpoint, model_id: ModelId, config: ClientConfig) -> ModelServers:
        text_config = checkpoint.config.get_text_config(decoder=True)
        facts = ModelFacts(model_id, checkpoint.num_blocks, int(text_config.hidden_size))
        only = ServerFilter(config.allowed_servers, config.blocked_servers, config.quantization)
        planner = DStarLitePlanner(config.costs, only, BanList(config.ban_s))
        return ModelServers(facts, await self._watch(model_id), planner, self.network, self.rpc, config)

    async def _watch(self, model_id: ModelId) -> ModelView:
        """A live view of who serves the model, for as long as the swarm is open."""
        config = self.membership.config

        async def watch(*, task_status: trio.TaskStatus[ModelView]) -> None:
            async with self.directory.watch(model_id, config.update_period_s) as view:
                task_status.started(view)
                await trio.sleep_forever()

        view: ModelView = await self.membership.nursery.start(watch)
        with trio.move_on_after(config.find_timeout_s):
            while not view.servers:
                await trio.sleep(FIND_AGAIN_AFTER_S)
                await view.refresh()
        if not view.servers:
            models = sorted(await self.directory.models())
            announced = f"announced are {', '.join(models)}" if models else "no model at all is announced"
            raise ModelNotFound(f"nobody serves {model_id}; {announced}")
        return view


def _usual_dtype(servers: ModelServers) -> torch.dtype:
    """What most of the servers compute in."""
    dtypes = Counter(dtype_of(server) for server in servers.known.values())
    return dtypes.most_common(1)[0][0]


@asynccontextmanager
async def open_swarm(
    peers: Sequence[str] = (),
    *,
    identity: Identity | None = None,
    config: ClientConfig | None = None,
    swarm_key: SwarmKey | None = None,
) -> AsyncIterator[Swarm]:
    """The swarm that the nodes at `peers` belong to, or those remembered from last time, joined as by `join_swarm`."""
    async with join_swarm(peers, identity=identity, config=config, swarm_key=swarm_key) as membership:
        swarm = Swarm(membership)
        try:
            yield swarm
        finally:
            swarm.rpc.close()
