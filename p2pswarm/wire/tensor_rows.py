"""Some rows of a tensor as it travels, and rows put together again, without decoding them.

A row is an element of the first dimension. So who takes a large tensor in parts need not hold all of it decoded, which
may be four times as large. Knows nothing of torch.
"""

from collections.abc import Sequence

from p2pswarm.wire.frames import num_bytes
from p2pswarm.wire.tensors import SCALE_BYTES, Codec, WireTensor, num_int8_blocks


def rows_of(wire: WireTensor, start: int, end: int) -> WireTensor:
    """The rows `[start, end)`, on the memory of the whole tensor; those of int8 are copied."""
    num_rows = wire.shape[0]
    assert 0 <= start <= end <= num_rows
    if (start, end) == (0, num_rows):
        return wire
    parts = [part[len(part) // num_rows * start : len(part) // num_rows * end] for part in _parts(wire)]
    data = parts[0] if len(parts) == 1 else b"".join(parts)
    return WireTensor(wire.dtype, (end - start, *wire.shape[1:]), data, wire.codec)


def joined_rows(wires: Sequence[WireTensor]) -> WireTensor:
    """All rows of at least one tensor, which differ in the number of their rows only."""
    first = wires[0]
    if len(wires) == 1:
        return first
    shape = (sum(wire.shape[0] for wire in wires), *first.shape[1:])
    by_part = zip(*map(_parts, wires), strict=True)
    return WireTensor(first.dtype, shape, b"".join(data for part in by_part for data in part), first.codec)


def _parts(wire: WireTensor) -> list[memoryview]:
    """What holds something of each row, one row after the other: for int8 all scales, then all values."""
    data = memoryview(wire.data).cast("B")
    if wire.codec is not Codec.BLOCKWISE_INT8:
        return [data]
    scale_bytes = SCALE_BYTES * num_int8_blocks(wire.shape)
    return [data[:scale_bytes], data[scale_bytes : num_bytes(wire.data)]]
