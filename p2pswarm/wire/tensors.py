"""`WireTensor`: a tensor as it travels, a dtype, a shape and a buffer, checked where it is made.

Knows nothing of torch: `wire/codecs.py` turns torch's tensors into these and back.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from p2pswarm.core.errors import ConfigError
from p2pswarm.wire.frames import Buffer, num_bytes

ITEM_BYTES: Mapping[str, int] = {"float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "bool": 1}
"""The dtypes that travel, and the bytes of one element."""
FLOAT_DTYPES = frozenset({"float32", "float16", "bfloat16"})

INT8_BLOCK = 64
"""Elements that share one scale: 6 % of extra bytes; the error follows the largest of 64 neighbours, not of the whole
row."""
SCALE_BYTES = 4


class Codec(Enum):
    """How a float tensor is written. `NONE` keeps every bit; the others are chosen by the client, never silently."""

    NONE = "none"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"
    BLOCKWISE_INT8 = "blockwise_int8"


@dataclass(frozen=True, slots=True)
class WireTensor:
    """A tensor as it travels: raw little-endian bytes in row-major order."""

    dtype: str
    """Of the decoded tensor: `float32 float16 bfloat16 int64 bool`."""
    shape: tuple[int, ...]
    data: Buffer
    codec: Codec = Codec.NONE

    def __post_init__(self) -> None:
        wanted_bytes = encoded_num_bytes(self.dtype, self.shape, self.codec)
        if num_bytes(self.data) != wanted_bytes:
            raise ConfigError(
                f"a {self.dtype} tensor of shape {list(self.shape)} takes {wanted_bytes} bytes with codec "
                f"{self.codec.value}, got {num_bytes(self.data)}"
            )

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)


def encoded_num_bytes(dtype: str, shape: tuple[int, ...], codec: Codec) -> int:
    """How many bytes such a tensor takes on the wire."""
    if dtype not in ITEM_BYTES:
        raise ConfigError(f"tensors are {', '.join(ITEM_BYTES)}, not {dtype[:32]}")
    if min(shape, default=0) < 0:
        raise ConfigError(f"a shape has no negative sizes, got {list(shape)}")
    num_elements = math.prod(shape)
    if codec is Codec.NONE:
        return num_elements * ITEM_BYTES[dtype]
    if dtype not in FLOAT_DTYPES:
        raise ConfigError(f"codec {codec.value} is for float tensors, not {dtype}")
    if codec is Codec.BLOCKWISE_INT8:
        return num_elements + SCALE_BYTES * num_int8_blocks(shape)
    return num_elements * 2


def num_int8_blocks(shape: tuple[int, ...]) -> int:
    """Blocks never cross a row (the last dimension), so that what a row becomes does not depend on its neighbours."""
    row_length = shape[-1] if shape else 1
    return math.prod(shape[:-1]) * -(-row_length // INT8_BLOCK)
