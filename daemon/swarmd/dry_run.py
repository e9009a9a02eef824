"""`swarmd start --throughput dry-run`: loads and measures the blocks that would be served, tells, and ends."""

from dataclasses import asdict

from p2pswarm.core.span import Span
from swarmd.config import ServerConfig
from swarmd.events import Events
from swarmd.throughput import ASSUMED_LINE_BITS_PER_S


def dry_run(config: ServerConfig, events: Events) -> None:
    """On a thread that may be kept busy. Raises `SwarmingError` as a start does."""
    from p2pswarm.blocks.light_imports import import_transformers_lightly  # imports torch: not for all that start

    import_transformers_lightly()
    import torch

    from swarmd.device import device_name
    from swarmd.engine import load, open_model

    opened = open_model(config)
    if opened.warning is not None:
        events("warning", message=opened.warning)
    span = config.blocks
    if span is None:
        num_blocks = config.num_blocks
        if num_blocks is None:
            count = opened.count_blocks(config.kv_cache, config.training_memory)
            events("sized", **asdict(count))
            num_blocks = count.num_blocks
        span = Span(0, min(num_blocks, opened.num_blocks))
    loaded = load(opened, span, config)
    speed = loaded.speed
    events(
        "measured",
        model=opened.checkpoint.name,
        blocks=str(span),
        num_blocks=span.num_blocks,
        dtype=opened.dtype_name,
        quantization=opened.quantization.value,
        device=device_name(opened.device),
        threads=torch.get_num_threads(),
        cache_tokens=loaded.cache_tokens,
        **asdict(speed.compute),
        inference_tokens_per_s=speed.num_blocks / speed.compute.decode_s,
        forward_tokens_per_s=speed.forward_tokens_per_s,
        line_bits_per_s=ASSUMED_LINE_BITS_PER_S,
        throughput_tokens_per_s=speed.server_tokens_per_s(ASSUMED_LINE_BITS_PER_S, using_relay=False),
    )
