"""The model side of a server's start: open the checkpoint, choose device, dtype and sizes, load the span, measure it.

All of it is blocking and belongs on the thread that owns the device. Importing this file imports torch and
transformers, which takes longer than all else: `swarmd/serve.py` does it on that thread, while it joins the swarm.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from importlib.metadata import version

import torch

from p2pswarm.blocks.adapters import Adapter, fit_adapter
from p2pswarm.blocks.architecture import lay_out
from p2pswarm.blocks.pages import PAGE_TOKENS
from p2pswarm.blocks.span_model import SpanModel, load_span
from p2pswarm.checkpoint.adapter_files import open_adapter
from p2pswarm.checkpoint.checkpoint import Checkpoint, open_checkpoint
from p2pswarm.checkpoint.progress import ProgressListener
from p2pswarm.core.errors import ConfigError
from p2pswarm.core.ids import ModelId
from p2pswarm.core.quantization import Quantization
from p2pswarm.core.span import Span
from swarmd.block_memory import block_weights_bytes, measure_needs
from swarmd.compute_speed import measure_compute
from swarmd.config import ServerConfig
from swarmd.device import (
    NAME_OF_DTYPE,
    choose_dtype,
    device_name,
    find_device,
    free_memory_bytes,
    note_on_other_devices,
    set_threads,
    spare_share,
)
from swarmd.kv_size import KVSize, kv_tokens
from swarmd.quantization_choice import choose_quantization
from swarmd.sizing import BlockCount, check_span_fits, count_blocks
from swarmd.speed_cache import MeasuredOn, SpeedCache
from swarmd.throughput import ComputeSpeed, SpanSpeed, ThroughputSetting, ThroughputSource

UNLIMITED_MAX_LENGTH = 1 << 17
"""For models that name no longest position (ALiBi): what the cache holds is the limit then."""


@dataclass(frozen=True)
class OpenedModel:
    """A model that is known, but of which nothing is loaded."""

    checkpoint: Checkpoint
    device: torch.device
    dtype: torch.dtype
    warning: str | None
    quantization: Quantization
    adapters: tuple[Adapter, ...] = ()

    @cached_property
    def model_id(self) -> ModelId:
        return self.checkpoint.model_id

    @property
    def num_blocks(self) -> int:
        return self.checkpoint.num_blocks

    @property
    def dtype_name(self) -> str:
        return NAME_OF_DTYPE[self.dtype]

    def count_blocks(self, kv_size: KVSize | None, training_bytes: int | None = None) -> BlockCount:
        """How many blocks this device can hold beside their KV cache. Raises `ConfigError` where not even one."""
        needs = measure_needs(self.checkpoint.config, self.dtype, self.quantization)
        needs = replace(needs, weights_bytes=self.with_adapters(needs.weights_bytes))
        free_bytes = free_memory_bytes(self.device)
        return count_blocks(needs, free_bytes, spare_share(self.device.type), kv_size, training_bytes)

    def with_adapters(self, weights_bytes: Sequence[int]) -> tuple[int, ...]:
        """What each block's weights take together with its part of the adapters."""
        return tuple(
            num_bytes + sum(adapter.block_bytes(index, self.dtype) for adapter in self.adapters)
            for index, num_bytes in enumerate(weights_bytes)
        )


@dataclass(frozen=True, slots=True)
class LoadedSpan:
    """A span that is ready to compute."""

    model: SpanModel
    speed: SpanSpeed
    cache_tokens: int
    max_length: int


def open_model(config: ServerConfig, listener: ProgressListener = lambda progress: None) -> OpenedModel:
    """Finds device and checkpoint. Raises `ConfigError`, `CheckpointError`, `UnsupportedModelError`.

    `listener` is told, now and later in this thread, what is downloaded, converted or hashed.
    """
    set_threads(config.threads)
    device = find_device(config.device)
    checkpoint = open_checkpoint(
        config.model,
        revision=config.revision,
        token=config.token,
        cache_dir=config.cache_dir,
        max_disk_bytes=config.max_disk_space,
        listener=listener,
    )
    has_bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
    choice = choose_dtype(config.dtype, checkpoint.dtype, device.type, cuda_has_bfloat16=has_bfloat16)
    quantization = choose_quantization(config.quant, checkpoint.config, choice.dtype, device)
    warnings = filter(None, (choice.warning, quantization.warning, note_on_other_devices(config.device, device)))
    warning = "; ".join(warnings) or None
    adapters = _open_adapters(config, checkpoint, choice.dtype, listener)
    opened = OpenedModel(checkpoint, device, choice.dtype, warning, quantization.quantization, adapters)
    if config.blocks is not None and config.blocks.end > opened.num_blocks:
        raise ConfigError(f"{checkpoint.name} has the blocks 0:{opened.num_blocks}, so not --blocks {config.blocks}")
    return opened


def load(opened: OpenedModel, span: Span, config: ServerConfig) -> LoadedSpan:
    """Reads the span's weights, measures how fast they compute, and divides what memory is left.

    Raises `ConfigError` where the memory is too small, and whatever is wrong with the checkpoint.
    """
    weights_bytes = block_weights_bytes(opened.checkpoint.config, opened.dtype, opened.quantization)
    check_span_fits(opened.with_adapters(weights_bytes), span, free_memory_bytes(opened.device))
    opened.checkpoint.release()  # of the blocks served before, if any: the disk may need their room
    model = load_span(
        opened.checkpoint,
        span,
        dtype=opened.dtype,
        device=opened.device,
        quantization=opened.quantization,
        adapters=opened.adapters,
    )
    speed = SpanSpeed(
        _compute_speed(opened, model, config.throughput),
        span.num_blocks,
        token_bytes=model.dtype.itemsize * model.hidden_size,
        stated_tokens_per_s=None if isinstance(config.throughput, ThroughputSource) else config.throughput,
    )
    usable_bytes = int(free_memory_bytes(opened.device) * (1 - spare_share(opened.device.type)))
    num_pages = max(1, kv_tokens(config.kv_cache, usable_bytes, model.cache_bytes_per_token) // PAGE_TOKENS)
    cache_tokens = num_pages * PAGE_TOKENS
    return LoadedSpan(model, speed, cache_tokens, _max_length(opened, config, cache_tokens))


def _open_adapters(
    config: ServerConfig, checkpoint: Checkpoint, dtype: torch.dtype, listener: ProgressListener
) -> tuple[Adapter, ...]:
    """All that were asked for, found to fit every block: a server may come to serve any. Raises `CheckpointError`."""
    if not config.adapters:
        return ()
    layout = lay_out(checkpoint.config, dtype)
    opened = [
        open_adapter(place, token=config.token, cache_dir=config.cache_dir, listener=listener)
        for place in config.adapters
    ]
    adapters = tuple(fit_adapter(files, layout) for files in opened)
    ids = [adapter.adapter_id for adapter in adapters]
    if len(set(ids)) < len(ids):
        raise ConfigError(f"adapters: the same one twice by the same name: {', '.join(ids)}")
    return adapters


def _compute_speed(opened: OpenedModel, model: SpanModel, source: ThroughputSetting) -> ComputeSpeed:
    """Measured now or, on this machine with these settings, before."""
    on = MeasuredOn(
        model_id=opened.model_id,
        num_blocks=model.span.num_blocks,
        device=device_name(opened.device),
        dtype=opened.dtype_name,
        quantization=opened.quantization.value,
        threads=torch.get_num_threads(),
        versions=f"torch {torch.__version__}, p2pswarm {version('p2pswarm')}",
    )
    cache = SpeedCache()
    is_asked_for = source in (ThroughputSource.EVAL, ThroughputSource.DRY_RUN)
    find = cache.measured_anew if is_asked_for else cache.measured_before
    return find(on, partial(measure_compute, model))


def _max_length(opened: OpenedModel, config: ServerConfig, cache_tokens: int) -> int:
    stated = getattr(opened.checkpoint.config.get_text_config(decoder=True), "max_position_embeddings", None)
    of_model = stated if isinstance(stated, int) and stated > 0 else UNLIMITED_MAX_LENGTH
    if config.max_length is not None and config.max_length > of_model:
        raise ConfigError(
            f"{opened.checkpoint.name} takes up to {of_model} tokens, so not --max-length {config.max_length}"
        )
    return min(config.max_length or of_model, cache_tokens)
