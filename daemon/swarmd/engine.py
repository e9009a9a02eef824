"""The model side of a server's start: open the checkpoint, choose device, dtype and sizes, load the span, measure it.

All of it is blocking and belongs on the thread that owns the device. Importing this file imports torch and
transformers, which takes longer than all else: `swarmd/serve.py` does it on that thread, while it joins the swarm.
"""

from dataclasses import dataclass
from functools import cached_property

import torch

from p2pswarm.blocks.architecture import lay_out
from p2pswarm.blocks.span_model import SpanModel, load_span
from p2pswarm.checkpoint.checkpoint import Checkpoint, open_checkpoint
from p2pswarm.core.errors import ConfigError
from p2pswarm.core.ids import ModelId
from p2pswarm.core.span import Span
from swarmd.block_choice import num_blocks_that_fit
from swarmd.config import ServerConfig
from swarmd.device import NAME_OF_DTYPE, choose_dtype, find_device, free_memory_bytes, set_threads
from swarmd.memory import default_cache_tokens
from swarmd.throughput import Throughput, measure_throughput

UNLIMITED_MAX_LENGTH = 1 << 17
"""For models that name no longest position (ALiBi): what the cache holds is the limit then."""


@dataclass(frozen=True)
class OpenedModel:
    """A model that is known, but of which nothing is loaded."""

    checkpoint: Checkpoint
    device: torch.device
    dtype: torch.dtype
    warning: str | None

    @cached_property
    def model_id(self) -> ModelId:
        return self.checkpoint.model_id

    @property
    def num_blocks(self) -> int:
        return self.checkpoint.num_blocks

    @property
    def dtype_name(self) -> str:
        return NAME_OF_DTYPE[self.dtype]

    def num_blocks_that_fit(self) -> int:
        """How many blocks this device could hold beside a cache."""
        blocks = lay_out(self.checkpoint.config, self.dtype).blocks
        total_bytes = sum(weight.numel() * self.dtype.itemsize for weight in blocks.parameters())
        return num_blocks_that_fit(free_memory_bytes(self.device), total_bytes // len(blocks), len(blocks))


@dataclass(frozen=True, slots=True)
class LoadedSpan:
    """A span that is ready to compute."""

    model: SpanModel
    throughput: Throughput
    cache_tokens: int
    max_length: int


def open_model(config: ServerConfig) -> OpenedModel:
    """Finds device and checkpoint. Raises `ConfigError`, `CheckpointError`, `UnsupportedModelError`."""
    set_threads(config.threads)
    device = find_device(config.device)
    checkpoint = open_checkpoint(config.model, revision=config.revision, token=config.token, cache_dir=config.cache_dir)
    has_bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
    choice = choose_dtype(config.dtype, checkpoint.dtype, device.type, cuda_has_bfloat16=has_bfloat16)
    opened = OpenedModel(checkpoint, device, choice.dtype, choice.warning)
    if config.blocks is not None and config.blocks.end > opened.num_blocks:
        raise ConfigError(f"{checkpoint.name} has the blocks 0:{opened.num_blocks}, so not --blocks {config.blocks}")
    return opened


def load(opened: OpenedModel, span: Span, config: ServerConfig) -> LoadedSpan:
    """Reads the span's weights and tries them out."""
    model = load_span(opened.checkpoint, span, dtype=opened.dtype, device=opened.device)
    throughput = measure_throughput(model)
    cache_tokens = config.cache_tokens or default_cache_tokens(
        free_memory_bytes(opened.device), model.cache_bytes_per_token
    )
    return LoadedSpan(model, throughput, cache_tokens, _max_length(opened, config, cache_tokens))


def _max_length(opened: OpenedModel, config: ServerConfig, cache_tokens: int) -> int:
    stated = getattr(opened.checkpoint.config.get_text_config(decoder=True), "max_position_embeddings", None)
    of_model = stated if isinstance(stated, int) and stated > 0 else UNLIMITED_MAX_LENGTH
    if config.max_length is not None and config.max_length > of_model:
        raise ConfigError(
            f"{opened.checkpoint.name} takes up to {of_model} tokens, so not --max-length {config.max_length}"
        )
    return min(config.max_length or of_model, cache_tokens)
