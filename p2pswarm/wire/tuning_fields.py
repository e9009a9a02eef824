"""`WireTuning` in a header and back: the sizes of its parts in one field, all of their bytes in one tensor.

    field   {"prompts": [blocks, prompt tokens, hidden], "layers": [[block, path, rank, inputs, outputs], ...]}
    tensor  one dimension: the prompts, then `down` and `up` of each layer

So hundreds of layers make a short header, and each part still lies on the frame's body without a copy.
"""

from collections.abc import Iterator
from typing import Any

from p2pswarm.wire.fields import Fields
from p2pswarm.wire.tensors import ITEM_BYTES, Codec, WireTensor
from p2pswarm.wire.tuning import MAX_TUNED_LAYERS, TunedLayer, WireTuning

_LAYER_TYPES = [int, str, int, int, int]


def tuning_values(name: str, tuning: WireTuning | None) -> dict[str, Any]:
    """What a header says of the tuning in the field `name`; nothing where there is none."""
    if tuning is None:
        return {}
    values: dict[str, Any] = {
        "layers": [
            (layer.block, layer.path, layer.rank, layer.down.shape[1], layer.up.shape[0]) for layer in tuning.layers
        ]
    }
    if tuning.prompts is not None:
        values["prompts"] = tuning.prompts.shape
    return {name: values}


def read_tuning(fields: Fields, name: str, packed: WireTensor | None) -> WireTuning | None:
    """The tuning that the field `name` and the tensor of the same name hold; None where there is neither."""
    if packed is None and not fields.has(name):
        return None
    if packed is None:
        fields.refuse(f"a tensor {name} with the bytes of the field {name}")
    if packed.codec is not Codec.NONE or len(packed.shape) != 1:
        fields.refuse(
            f"the tensor {name} to be of one dimension by codec none, got {packed.codec.value} {packed.shape}"
        )
    sizes = fields.nested(name)
    parts = _Parts(packed, sizes)
    prompts = parts.cut(_checked_prompts(sizes)) if sizes.has("prompts") else None
    layers = []
    for block, path, rank, num_inputs, num_outputs in _checked_layers(sizes):
        down = parts.cut((rank, num_inputs))
        layers.append(TunedLayer(block, path, down, parts.cut((num_outputs, rank))))
    parts.check_end()
    return WireTuning(prompts, tuple(layers))


class _Parts:
    """Cuts tensors off the front of the one that holds them all."""

    def __init__(self, packed: WireTensor, sizes: Fields) -> None:
        self._packed = packed
        self._data = memoryview(packed.data)
        self._offset = 0
        self._sizes = sizes

    def cut(self, shape: tuple[int, ...]) -> WireTensor:
        """The next one. Raises `ConfigError` where so much is not left."""
        size_bytes = ITEM_BYTES[self._packed.dtype]
        for size in shape:
            size_bytes *= size
        data = self._data[self._offset : self._offset + size_bytes]
        self._offset += size_bytes
        return WireTensor(self._packed.dtype, shape, data, self._packed.codec)

    def check_end(self) -> None:
        if self._offset != self._data.nbytes:
            self._sizes.refuse(f"{self._offset} bytes for these sizes, got {self._data.nbytes}")


def _checked_prompts(sizes: Fields) -> tuple[int, ...]:
    shape = sizes.items("prompts", 3)
    if [type(size) for size in shape] != [int] * 3:
        sizes.refuse(f"prompts to be sizes [blocks, prompt tokens, hidden], got {shape!r:.100}")
    return tuple(shape)


def _checked_layers(sizes: Fields) -> Iterator[tuple[int, str, int, int, int]]:
    for entry in sizes.items("layers", MAX_TUNED_LAYERS):
        if not isinstance(entry, list) or list(map(type, entry)) != _LAYER_TYPES:
            sizes.refuse(f"layers to be lists [block, path, rank, inputs, outputs], got {entry!r:.100}")
        block, path, rank, num_inputs, num_outputs = entry
        yield block, path, rank, num_inputs, num_outputs
