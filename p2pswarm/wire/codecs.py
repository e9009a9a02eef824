"""Torch tensors <-> `WireTensor`: the codecs. The only file of this room that imports torch.

    codec               bytes an element    what comes back
    none                those of the dtype  every bit; NaN and infinities too
    float16             2                   |x - x'| <= max(2^-11 |x|, 2^-25); NaN and infinities too
    bfloat16            2                   |x - x'| <= max(2^-8 |x|, 2^-134); NaN and infinities too
    blockwise int8      1 + 4/64            |x - x'| <= absmax / 254 (1 + 2^-14), absmax over the value's block of 64

So the error of a whole tensor, as a vector beside the tensor's length, is at most 0.4 % for bfloat16 and 3.2 % for int8
(8 / 254; 0.6 % where values are spread as a bell curve). For float16 it is 0.05 %, but for values below 6e-5, of which
gradients have many: choose bfloat16 or int8 for these.

A finite value beyond the range of a 16-bit codec, and NaN or infinity for int8, is a `CodecError`: what was
compressed is never silently something else. For int8, each row (last dimension) is cut into blocks of 64, the last
one shorter; a block becomes `scale = absmax / 127` and `round(x / scale)` for each value. On the wire come first all
scales (float32), then all values (int8). The bound is that of the float32 result: a 16-bit tensor is rounded to its
dtype once more. Values below 1e-36 may come back as 0.
"""

import math

import torch
from torch.nn import functional

from p2pswarm.core.errors import CodecError
from p2pswarm.wire.tensors import INT8_BLOCK, ITEM_BYTES, SCALE_BYTES, Codec, WireTensor, num_int8_blocks

_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in ITEM_BYTES}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_SIXTEEN_BITS = {Codec.FLOAT16: torch.float16, Codec.BFLOAT16: torch.bfloat16}
_INT8_MAX = 127


def encode_tensor(tensor: torch.Tensor, codec: Codec = Codec.NONE) -> WireTensor:
    """The tensor, ready to be sent.

    Shares memory with a contiguous CPU tensor, which may not change until it has been sent. Integer and bool tensors
    always travel as they are. Raises `CodecError` for values that the codec cannot carry.
    """
    name = _NAMES.get(tensor.dtype)
    if name is None:
        raise CodecError(f"tensors of {', '.join(_DTYPES)} can be sent, not {tensor.dtype}")
    tensor = tensor.detach()
    shape = tuple(tensor.shape)
    if not tensor.is_floating_point():
        codec = Codec.NONE
    if codec is Codec.NONE:
        return WireTensor(name, shape, _bytes_of(tensor))
    if codec is Codec.BLOCKWISE_INT8:
        return WireTensor(name, shape, _to_int8(tensor), codec)
    return WireTensor(name, shape, _bytes_of(_to_sixteen_bits(tensor, codec)), codec)


def decode_tensor(wire: WireTensor) -> torch.Tensor:
    """The tensor on the CPU, in `wire.dtype`. Lies on `wire.data` where that needs no conversion and is writable."""
    dtype = _DTYPES[wire.dtype]
    if wire.codec is Codec.BLOCKWISE_INT8:
        return _from_int8(memoryview(wire.data), wire.shape).to(dtype)
    if wire.codec is not Codec.NONE:
        return _laid_on(memoryview(wire.data), _SIXTEEN_BITS[wire.codec]).view(wire.shape).to(dtype)
    if dtype is torch.bool:  # any byte may come, but a bool other than 0 and 1 is undefined to torch
        return _laid_on(memoryview(wire.data), torch.uint8).ne(0).view(wire.shape)
    return _laid_on(memoryview(wire.data), dtype).view(wire.shape)


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite; ten times as fast as `isfinite().all()` for long prompts."""
    if tensor.numel() == 0:
        return True
    smallest, largest = tensor.aminmax()  # NaN where one of the elements is
    return bool(smallest > -math.inf) and bool(largest < math.inf)


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _laid_on(data: memoryview, dtype: torch.dtype) -> torch.Tensor:
    """The bytes as a flat tensor, copied only where torch may not use them in place."""
    if data.nbytes == 0:
        return torch.empty(0, dtype=dtype)
    tensor = torch.frombuffer(bytearray(data) if data.readonly else data, dtype=dtype)
    return tensor if tensor.data_ptr() % dtype.itemsize == 0 else tensor.clone()


def _to_sixteen_bits(tensor: torch.Tensor, codec: Codec) -> torch.Tensor:
    short = tensor.to(_SIXTEEN_BITS[codec])
    if not is_finite(short) and not torch.equal(short.isinf(), tensor.isinf()):
        raise CodecError(
            f"codec {codec.value} cannot carry a value of {tensor.abs().amax().item():.4g}; choose a wider one"
        )
    return short


def _to_int8(tensor: torch.Tensor) -> bytes:
    if tensor.numel() == 0:
        return b""
    row_length = tensor.shape[-1] if tensor.dim() else 1
    rows = tensor.to("cpu", torch.float32).reshape(-1, row_length)
    blocks = functional.pad(rows, (0, -row_length % INT8_BLOCK)).view(len(rows), -1, INT8_BLOCK)
    scales = blocks.abs().amax(dim=2) / _INT8_MAX
    if not (scales * _INT8_MAX).isfinite().all():  # which the largest float32 would not be either
        raise CodecError("codec blockwise_int8 cannot carry NaN or infinity; choose another")
    divisors = torch.where(scales > 0, scales, 1.0).unsqueeze(2)
    values = (blocks / divisors).round_().clamp_(-_INT8_MAX, _INT8_MAX).to(torch.int8)
    return b"".join((_bytes_of(scales), _bytes_of(values.flatten(1)[:, :row_length].contiguous())))


def _from_int8(data: memoryview, shape: tuple[int, ...]) -> torch.Tensor:
    if data.nbytes == 0:
        return torch.empty(shape)
    scale_bytes = SCALE_BYTES * num_int8_blocks(shape)
    row_length = shape[-1] if shape else 1
    scales = _laid_on(data[:scale_bytes], torch.float32).view(-1, -(-row_length // INT8_BLOCK))
    values = _laid_on(data[scale_bytes:], torch.int8).view(-1, row_length)
    return (values * scales.repeat_interleave(INT8_BLOCK, dim=1)[:, :row_length]).view(shape)
