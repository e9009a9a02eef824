"""The first bytes of a safetensors file, which say where in it each tensor lies: read from a stranger, and written.

    8 bytes: length n, little-endian | n bytes: JSON, name -> dtype, shape, [start, end) | the tensors, without a gap

Tensors are bytes here; `safetensors` itself checks that a shape agrees with its bytes when it opens a file.
"""

import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from p2pswarm.core.errors import CheckpointError

LENGTH = struct.Struct("<Q")
MAX_JSON_BYTES = 100_000_000
"""As in the safetensors package."""
METADATA_NAME = "__metadata__"


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """Where a tensor lies."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int
    """Bytes of the whole file, half-open."""

    @property
    def size_bytes(self) -> int:
        return self.end - self.start


def header_size(first_bytes: bytes, file_bytes: int, file_name: str) -> int:
    """How many bytes the header of a file of `file_bytes` takes, from its first 8. Raises `CheckpointError`."""
    if len(first_bytes) < LENGTH.size:
        raise CheckpointError(f"{file_name} is no safetensors file: it has {len(first_bytes)} bytes")
    (json_bytes,) = LENGTH.unpack_from(first_bytes)
    if json_bytes > min(MAX_JSON_BYTES, file_bytes - LENGTH.size):
        raise CheckpointError(
            f"{file_name} is damaged or no safetensors file: it claims {json_bytes} bytes of header in a file of "
            f"{file_bytes}"
        )
    return LENGTH.size + int(json_bytes)


def parse_header(header: bytes, file_bytes: int, file_name: str) -> tuple[TensorPlace, ...]:
    """The tensors in the order in which they lie, every byte of the file accounted for. Raises `CheckpointError`."""
    try:
        entries = json.loads(header[LENGTH.size :])
        places = [_place(name, entry, len(header)) for name, entry in entries.items() if name != METADATA_NAME]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{file_name} has a damaged header: {error!r}") from error
    places.sort(key=lambda place: (place.start, place.end))
    position = len(header)
    for place in places:
        if place.start != position or place.end < position:
            raise CheckpointError(
                f"{file_name} is damaged: {place.name} lies at [{place.start}, {place.end}), expected from {position}"
            )
        position = place.end
    if position != file_bytes:
        raise CheckpointError(f"{file_name} is damaged: its header tells of {position} bytes, it has {file_bytes}")
    return tuple(places)


def make_header(tensors: Iterable[TensorPlace]) -> bytes:
    """The header of a file with these tensors one after the other, wherever they lie now."""
    entries = {}
    position = 0
    for tensor in tensors:
        end = position + tensor.size_bytes
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": (position, end)}
        position = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned
    return LENGTH.pack(len(text)) + text


def _place(name: str, entry: Mapping[str, Any], offset: int) -> TensorPlace:
    start, end = entry["data_offsets"]
    if not (isinstance(start, int) and isinstance(end, int) and start >= 0):
        raise ValueError(f"{name} has the offsets {start!r}, {end!r}")
    shape = tuple(entry["shape"])
    if not all(isinstance(size, int) for size in shape):
        raise ValueError(f"{name} has the shape {shape!r}")
    return TensorPlace(name, str(entry["dtype"]), shape, offset + start, offset + end)
