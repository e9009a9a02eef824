"""The blocking way in: a model from its name and any one peer of a swarm."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import torch
from transformers import PreTrainedModel

from p2pswarm.blocks.architecture import Head
from p2pswarm.client.config import ClientConfig
from p2pswarm.client.distributed_model import DistributedModel
from p2pswarm.client.local_adapter import is_local_adapter
from p2pswarm.client.portal import Portal
from p2pswarm.client.swarm import open_swarm
from p2pswarm.core.errors import ConfigError
from p2pswarm.models.distributed_causal_lm import distributed
from p2pswarm.models.distributed_shell import Connection
from p2pswarm.models.tuning.options import TuningMode, TuningOptions
from p2pswarm.net.identity import Identity
from p2pswarm.net.private.swarm_key import SwarmKey


class AutoDistributedModel:
    """Gives models without a head; has no instances, like transformers' auto classes."""

    head: ClassVar[Head] = Head.NONE

    def __init__(self) -> None:
        raise TypeError(f"use {type(self).__name__}.from_pretrained(MODEL, peers=[...])")

    @classmethod
    def from_pretrained(
        cls,
        model: str,
        *,
        peers: Sequence[str] = (),
        dtype: torch.dtype | None = None,
        revision: str | None = None,
        token: str | None = None,
        cache_dir: Path | None = None,
        identity: Identity | None = None,
        active_adapter: str | Path | None = None,
        config: ClientConfig | None = None,
        swarm_key: Path | str | None = None,
        tuning_mode: TuningMode | None = None,
        pre_seq_len: int = 16,
        lora_rank: int = 8,
        lora_alpha: int = 16,
        target_modules: Sequence[str] | str | None = None,
        num_labels: int | None = None,
        seed: int = 0,
    ) -> PreTrainedModel:
        """transformers' own model class, whose blocks run in the swarm that `peers` (multiaddrs) belong to.

        `model` is a folder, a hub id or a `.gguf` file; only what is not in blocks is read. `dtype` is that of the part
        that runs here, by default what the servers compute in. `active_adapter` names a LoRA adapter that servers have,
        or a folder here with what was tuned; it goes before the config's. `swarm_key` is the file of a private swarm's
        key; an invitation among the peers does as well. In addition to what transformers gives it, the model has
        `inference_session(max_length=...)`, `tokenizer`, `close()`, and is a context manager.

        `tuning_mode` begins to train something small beside the frozen model, its start drawn with `seed`: `ptune`, the
        embeddings of `pre_seq_len` virtual tokens in front of each text; `deep_ptune`, in addition what is added to
        them at each block; `lora`, low-rank pairs for layers of the blocks (`TuningOptions` says more). The model then
        has them as `tuning`, `save_pretrained(FOLDER)` that writes nothing else, and `load_tuning(FOLDER)`.

        Raises `NoPeersError`, `ModelNotFound`, `CheckpointError`, `UnsupportedModelError`, `ConfigError`.
        """
        options = None
        if tuning_mode is not None:
            options = TuningOptions(tuning_mode, pre_seq_len, lora_rank, lora_alpha, target_modules, seed)
        if num_labels is not None and (cls.head is not Head.SEQUENCE_CLASSIFICATION or num_labels < 1):
            raise ConfigError(f"num_labels is 1 or more, for sequence classification only; got {num_labels}")
        if active_adapter is not None:
            config = replace(config or ClientConfig(), active_adapter=str(active_adapter))
        if options is not None and config is not None and is_local_adapter(config.active_adapter or ""):
            raise ConfigError(
                f"to train the adapter in {config.active_adapter} further, leave out active_adapter, and call "
                "load_tuning with the folder"
            )
        key = None if swarm_key is None else SwarmKey.load(Path(swarm_key))
        portal = Portal()
        try:
            swarm = portal.enter(open_swarm(peers, identity=identity, config=config, swarm_key=key)).value

            async def load() -> DistributedModel:
                return await swarm.load(
                    model,
                    dtype=dtype,
                    revision=revision,
                    token=token,
                    cache_dir=cache_dir,
                    call=portal.call,
                    head=cls.head,
                    num_labels=num_labels,
                    seed=seed,
                )

            loaded = portal.call(load)
            return distributed(loaded.shell, Connection(portal, swarm, loaded), options, model)
        except BaseException:
            portal.close()
            raise


class AutoDistributedModelForCausalLM(AutoDistributedModel):
    """Gives models that generate."""

    head = Head.CAUSAL_LM


class AutoDistributedModelForSequenceClassification(AutoDistributedModel):
    """Gives models with a head for `num_labels` classes, by default those of the checkpoint's config.

    The head is transformers' own and is trained along, in float32. It is the checkpoint's, or where that has none,
    drawn with the seed.
    """

    head = Head.SEQUENCE_CLASSIFICATION
