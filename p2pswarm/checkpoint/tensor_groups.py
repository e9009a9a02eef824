"""Which tensors are fetched and kept together, and where their bytes are: pure arithmetic over names and places.

Those of one block are a group: all whose names agree up to their first number. Each tensor outside the blocks is one by
itself. Most writers put a block's tensors side by side, so that a group is one range of one file.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby

from p2pswarm.checkpoint.safetensors_header import TensorPlace, make_header

FIRST_NUMBER = re.compile(r"^(?:.*?\.)?\d+(?=\.)")
"""`model.layers.12` of `model.layers.12.mlp.experts.3.up_proj.weight`."""


@dataclass(frozen=True, slots=True)
class Part:
    """A tensor and the hub's file that has it."""

    file_name: str
    place: TensorPlace


@dataclass(frozen=True, slots=True)
class Group:
    """Tensors that are kept in one file of the cache, in the order of `parts`."""

    key: str
    header: bytes
    parts: tuple[Part, ...]

    @property
    def size_bytes(self) -> int:
        return len(self.header) + sum(part.place.size_bytes for part in self.parts)

    def positions(self) -> dict[tuple[str, str], int]:
        """Where each tensor begins in the group's file, by the name of the hub's file and its own."""
        positions = {}
        position = len(self.header)
        for part in self.parts:
            positions[part.file_name, part.place.name] = position
            position += part.place.size_bytes
        return positions


def group_of(tensor_name: str) -> str:
    """The name of the block, or of the tensor itself where it is in none."""
    match = FIRST_NUMBER.match(tensor_name)
    return match.group() if match else tensor_name


def make_group(key: str, parts: Iterable[Part]) -> Group:
    ordered = tuple(sorted(parts, key=lambda part: (part.file_name, part.place.start)))
    return Group(key, make_header(part.place for part in ordered), ordered)


def ranges_of(parts: Iterable[Part]) -> Iterator[tuple[str, int, int]]:
    """File name, start and end of each stretch of bytes without a gap."""
    for file_name, in_file in groupby(parts, lambda part: part.file_name):
        places = [part.place for part in in_file]
        start = end = places[0].start
        for place in places:
            if place.start != end:
                yield file_name, start, end
                start = place.start
            end = place.end
        yield file_name, start, end
