"""The blocking way in: a model from its name and any one peer of a swarm."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import torch
from transformers import PreTrainedModel

from p2pswarm.client.config import ClientConfig
from p2pswarm.client.distributed_model import DistributedModel
from p2pswarm.client.portal import Portal
from p2pswarm.client.swarm import open_swarm
from p2pswarm.models.distributed_causal_lm import Connection, distributed
from p2pswarm.net.identity import Identity


class AutoDistributedModelForCausalLM:
    """Gives models; has no instances, like transformers' auto classes."""

    def __init__(self) -> NoReturn:
        raise TypeError("use AutoDistributedModelForCausalLM.from_pretrained(MODEL, peers=[...])")

    @staticmethod
    def from_pretrained(
        model: str,
        *,
        peers: Sequence[str] = (),
        dtype: torch.dtype | None = None,
        revision: str | None = None,
        token: str | None = None,
        cache_dir: Path | None = None,
        identity: Identity | None = None,
        active_adapter: str | None = None,
        config: ClientConfig | None = None,
    ) -> PreTrainedModel:
        """transformers' own model class, whose blocks run in the swarm that `peers` (multiaddrs) belong to.

        `model` is a folder, a hub id or a `.gguf` file; only what is not in blocks is read. `dtype` is that of the part
        that runs here, by default what the servers compute in. `active_adapter` names a LoRA adapter that servers have;
        it goes before the config's. In addition to what transformers gives it, the model has
        `inference_session(max_length=...)`, `tokenizer`, `close()`, and is a context manager.

        Raises `NoPeersError`, `ModelNotFound`, `CheckpointError`, `UnsupportedModelError`, `ConfigError`.
        """
        if active_adapter is not None:
            config = replace(config or ClientConfig(), active_adapter=active_adapter)
        portal = Portal()
        try:
            swarm = portal.enter(open_swarm(peers, identity=identity, config=config)).value

            async def load() -> DistributedModel:
                return await swarm.load(
                    model, dtype=dtype, revision=revision, token=token, cache_dir=cache_dir, call=portal.call
                )

            loaded = portal.call(load)
        except BaseException:
            portal.close()
            raise
        return distributed(loaded.shell, Connection(portal, swarm, loaded))
