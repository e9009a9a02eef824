"""How many blocks fit into a device's memory, and what they share it with. Pure: facts in, decision out.

    free memory = spare + weights of the blocks + KV cache of the blocks + memory to work in

`swarmd/block_memory.py` finds the facts out, `swarmd/kv_size.py` says how large a KV cache is.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from p2pswarm.core.byte_sizes import format_byte_size
from p2pswarm.core.errors import ConfigError
from p2pswarm.core.span import Span
from swarmd.kv_size import MIN_TOKENS, SENSIBLE_TOKENS, KVBytes, KVSize, KVTokens
from swarmd.training_memory import BackwardMemory


@dataclass(frozen=True, slots=True)
class BlockNeeds:
    """What a model's blocks take in a device's memory."""

    weights_bytes: tuple[int, ...]
    """Of each block."""
    kv_bytes_per_token: int
    """Keys and values of one token in one block."""
    working_bytes: int
    """Of the largest pass, and of whatever else is there only for a while; for any number of blocks."""
    backward: BackwardMemory = field(default_factory=BackwardMemory)
    """Of gradients, which run when no pass does."""

    @property
    def num_blocks(self) -> int:
        return len(self.weights_bytes)

    def largest_span_bytes(self, num_blocks: int) -> int:
        """The weights of as many adjacent blocks, wherever they weigh most."""
        sums = [0, *accumulate(self.weights_bytes)]
        return max(end - start for start, end in zip(sums, sums[num_blocks:], strict=False))


@dataclass(frozen=True, slots=True)
class BlockCount:
    """How many blocks to serve, and why."""

    num_blocks: int
    num_model_blocks: int
    free_bytes: int
    spare_bytes: int
    """Of those: left to others."""
    block_bytes: int
    """Weights of one block, on average."""
    kv_bytes: int
    """Kept for the KV cache."""
    working_bytes: int
    """For what runs, one thing at a time: passes through the blocks, and gradients back."""


def count_blocks(
    needs: BlockNeeds,
    free_bytes: int,
    spare_share: float,
    kv_size: KVSize | None,
    training_bytes: int | None = None,
) -> BlockCount:
    """As many blocks as fit beside their KV cache. Raises `ConfigError` where not even one does.

    `training_bytes`: what gradients may take; None: what they take by default.
    """

    def working_bytes(num_blocks: int) -> int:
        gradients = needs.backward.default_bytes(num_blocks) if training_bytes is None else training_bytes
        return max(needs.working_bytes, gradients)

    usable_bytes = int(free_bytes * (1 - spare_share))
    for num_blocks in range(needs.num_blocks, 0, -1):
        kv_bytes = kept_kv_bytes(needs, num_blocks, kv_size)
        if needs.largest_span_bytes(num_blocks) + kv_bytes + working_bytes(num_blocks) <= usable_bytes:
            return BlockCount(
                num_blocks,
                needs.num_blocks,
                free_bytes,
                spare_bytes=free_bytes - usable_bytes,
                block_bytes=sum(needs.weights_bytes) // needs.num_blocks,
                kv_bytes=kv_bytes,
                working_bytes=working_bytes(num_blocks),
            )
    weights_bytes, kv_bytes = needs.largest_span_bytes(1), kept_kv_bytes(needs, 1, kv_size)
    wanted_bytes = weights_bytes + kv_bytes + working_bytes(1)
    raise ConfigError(
        f"too little memory for one block: {format_byte_size(usable_bytes)} can be used "
        f"({format_byte_size(free_bytes)} are free), wanted {format_byte_size(wanted_bytes)} "
        f"({format_byte_size(weights_bytes)} weights, {format_byte_size(kv_bytes)} KV cache, "
        f"{format_byte_size(working_bytes(1))} to work in). End other programs, or try a smaller dtype (--dtype "
        "bfloat16), quantized weights (--quant nf4), a smaller KV cache (--kv-cache 2048) or less for training "
        "(--training-memory 64MiB)"
    )


def check_span_fits(weights_bytes: Sequence[int], span: Span, free_bytes: int) -> None:
    """Raises `ConfigError` where the blocks of a span, out of a model with such blocks, are more than is free."""
    wanted_bytes = sum(weights_bytes[span.start : span.end])
    if wanted_bytes <= free_bytes:
        return
    fitting = sum(total_bytes <= free_bytes for total_bytes in accumulate(weights_bytes[span.start : span.end]))
    advice = f"{fitting} would fit" if fitting else "not even one fits"
    raise ConfigError(
        f"too little memory: the weights of blocks {span} take {format_byte_size(wanted_bytes)}, and "
        f"{format_byte_size(free_bytes)} are free ({advice}). Serve fewer, or leave --blocks and --num-blocks out: "
        "then the server chooses a number that fits"
    )


def kept_kv_bytes(needs: BlockNeeds, num_blocks: int, kv_size: KVSize | None) -> int:
    """What `num_blocks` blocks leave room for; of a share, which follows what is left, one chat is certain."""
    bytes_per_token = needs.kv_bytes_per_token * num_blocks
    match kv_size:
        case KVBytes(num_bytes):
            return num_bytes
        case KVTokens(num_tokens):
            return num_tokens * bytes_per_token
        case None:
            return SENSIBLE_TOKENS * bytes_per_token
        case _:
            return MIN_TOKENS * bytes_per_token
