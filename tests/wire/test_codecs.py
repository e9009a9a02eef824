"""Codecs: `none` keeps every bit, the others keep what their docstring states, and nothing is lost in silence."""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pswarm.core.errors import CodecError
from p2pswarm.wire.codecs import decode_tensor, encode_tensor, is_finite
from p2pswarm.wire.messages import Codec, WireTensor

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool]
SHAPES = [(), (0,), (5,), (1, 1, 576), (2, 0, 8), (3, 7, 65), (2, 3, 4, 128)]


def travelled(wire: WireTensor) -> WireTensor:
    """As a receiver has it: on a buffer of its own."""
    return WireTensor(wire.dtype, wire.shape, memoryview(bytearray(wire.data)), wire.codec)


def tensors(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(shape))
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    return torch.randint(0, 2, shape, generator=generator).to(dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_none_keeps_every_bit(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    sent = tensors(shape, dtype)
    received = decode_tensor(travelled(encode_tensor(sent)))
    assert received.dtype == dtype
    assert received.shape == sent.shape
    assert torch.equal(received, sent)


def test_none_keeps_nan_and_infinities() -> None:
    sent = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0])
    assert bytes(encode_tensor(decode_tensor(travelled(encode_tensor(sent)))).data) == sent.numpy().tobytes()


def test_received_tensors_are_writable_without_a_warning_or_a_copy() -> None:
    wire = travelled(encode_tensor(torch.zeros(4)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decode_tensor(wire).add_(1)
        decode_tensor(WireTensor("float32", (4,), bytes(16))).add_(1)  # read-only bytes are copied
    assert decode_tensor(wire).tolist() == [1, 1, 1, 1]


def test_sent_tensors_are_not_copied_and_need_not_be_contiguous() -> None:
    tensor = torch.arange(6.0).reshape(2, 3)
    wire = encode_tensor(tensor)
    tensor[0, 0] = 9
    assert decode_tensor(wire)[0, 0] == 9
    assert decode_tensor(travelled(encode_tensor(tensor.T))).tolist() == tensor.T.tolist()
    assert decode_tensor(encode_tensor(torch.ones(2, requires_grad=True))).tolist() == [1, 1]


def test_unaligned_data_and_odd_bools_are_read_safely() -> None:
    shifted = memoryview(bytearray(b"x") + torch.arange(4.0).numpy().tobytes())[1:]
    assert decode_tensor(WireTensor("float32", (4,), shifted)).tolist() == [0, 1, 2, 3]
    assert decode_tensor(WireTensor("bool", (3,), b"\x00\x01\xff")).tolist() == [False, True, True]


@pytest.mark.parametrize("codec", [Codec.FLOAT16, Codec.BFLOAT16])
@given(values=st.lists(st.floats(-60000, 60000, width=32), min_size=1, max_size=50))
@settings(deadline=None)
def test_sixteen_bits_round_to_nearest(codec: Codec, values: list[float]) -> None:
    sent = torch.tensor(values)
    short = {Codec.FLOAT16: torch.float16, Codec.BFLOAT16: torch.bfloat16}[codec]
    wire = travelled(encode_tensor(sent, codec))
    assert len(wire.data) == 2 * len(values)
    assert torch.equal(decode_tensor(wire), sent.to(short).float())


@pytest.mark.parametrize("codec", [Codec.FLOAT16, Codec.BFLOAT16])
def test_sixteen_bits_keep_nan_and_infinity_but_refuse_to_overflow(codec: Codec) -> None:
    sent = torch.tensor([float("nan"), float("inf"), 1.0])
    assert torch.equal(decode_tensor(encode_tensor(sent, codec)).isnan(), sent.isnan())
    assert torch.equal(decode_tensor(encode_tensor(sent, codec)).isinf(), sent.isinf())
    with pytest.raises(CodecError, match="cannot carry a value of"):
        encode_tensor(torch.tensor([1.0, -3.4e38]), codec)


@given(
    shape=st.tuples(st.integers(1, 3), st.integers(0, 2), st.integers(1, 150)),
    exponent=st.integers(-44, 38),
    seed=st.integers(0, 1 << 32),
)
@settings(deadline=None, max_examples=300)
def test_int8_error_stays_within_its_bound(shape: tuple[int, ...], exponent: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1
    sent = (spread.pow(3) * 10.0**exponent).float()
    received = decode_tensor(travelled(encode_tensor(sent, Codec.BLOCKWISE_INT8)))
    for start in range(0, shape[-1], 64):
        block, came = sent[..., start : start + 64].double(), received[..., start : start + 64].double()
        absmax = block.abs().amax(-1, keepdim=True)
        assert ((block - came).abs() <= absmax / 254 * (1 + 2**-14) + 1e-36).all()


@given(st.lists(st.floats(-(2.0**127), 2.0**127, width=32), min_size=1, max_size=70))
@settings(deadline=None)
def test_int8_keeps_its_bound_for_awkward_values(values: list[float]) -> None:
    sent = torch.tensor(values)
    received = decode_tensor(travelled(encode_tensor(sent, Codec.BLOCKWISE_INT8))).double()
    for start in range(0, len(values), 64):
        block = sent[start : start + 64].double()
        error = (block - received[start : start + 64]).abs()
        assert (error <= block.abs().max() / 254 * (1 + 2**-14) + 1e-36).all()


@pytest.mark.parametrize(
    ("codec", "relative", "absolute"),
    [(Codec.FLOAT16, 2**-11, 2**-25), (Codec.BFLOAT16, 2**-8, 2**-134)],
)
@given(
    values=st.lists(
        st.floats(-60000, 60000, width=32) | st.floats(-(2.0**-20), 2.0**-20, width=32), min_size=1, max_size=50
    )
)
@settings(deadline=None)
def test_sixteen_bit_errors_stay_within_their_bounds(
    codec: Codec, relative: float, absolute: float, values: list[float]
) -> None:
    sent = torch.tensor(values)
    error = (decode_tensor(travelled(encode_tensor(sent, codec))).double() - sent.double()).abs()
    assert (error <= (relative * sent.double().abs()).clamp(min=absolute)).all()


@pytest.mark.parametrize(("codec", "bound"), [(Codec.BFLOAT16, 2**-8), (Codec.BLOCKWISE_INT8, 8 / 254 * 1.0001)])
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 150)),
    exponent=st.integers(-30, 30),
    power=st.integers(1, 9),
    seed=st.integers(0, 1 << 32),
)
@settings(deadline=None)
def test_a_gradient_of_any_size_keeps_its_direction(
    codec: Codec, bound: float, shape: tuple[int, ...], exponent: int, power: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1
    sent = (spread.pow(power) * 10.0**exponent).float()
    error = decode_tensor(travelled(encode_tensor(sent, codec))).double() - sent.double()
    assert error.norm() <= bound * sent.double().norm() + 1e-36


def test_int8_loses_less_than_a_hundredth_of_a_bell_curve() -> None:
    sent = torch.randn(8, 128, 576, generator=torch.Generator().manual_seed(1)) * 1e-7
    error = decode_tensor(travelled(encode_tensor(sent, Codec.BLOCKWISE_INT8))) - sent
    assert 0.005 < error.norm() / sent.norm() < 0.007


def test_int8_rows_do_not_depend_on_their_neighbours() -> None:
    rows = torch.randn(2, 1, 70) * torch.tensor([1.0, 1000.0]).view(2, 1, 1)
    together = decode_tensor(encode_tensor(rows, Codec.BLOCKWISE_INT8))
    alone = decode_tensor(encode_tensor(rows[:1], Codec.BLOCKWISE_INT8))
    assert torch.equal(together[:1], alone)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int8_gives_back_shape_and_dtype(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    sent = tensors(shape, dtype)
    received = decode_tensor(travelled(encode_tensor(sent, Codec.BLOCKWISE_INT8)))
    assert received.dtype == dtype
    torch.testing.assert_close(received, sent, rtol=0.01, atol=0.03)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_int8_refuses_what_is_not_finite(bad: float) -> None:
    with pytest.raises(CodecError, match="NaN or infinity"):
        encode_tensor(torch.tensor([[1.0] * 100 + [bad]]), Codec.BLOCKWISE_INT8)


def test_whole_numbers_travel_as_they_are_whatever_the_codec() -> None:
    assert encode_tensor(torch.tensor([1, 2]), Codec.BLOCKWISE_INT8).codec is Codec.NONE


def test_dtypes_that_do_not_travel_are_refused() -> None:
    with pytest.raises(CodecError, match=r"not torch\.float64"):
        encode_tensor(torch.zeros(2, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_value_that_is_not_finite_is_noticed(bad: float, dtype: torch.dtype) -> None:
    tensor = torch.zeros(2, 3, 4, dtype=dtype)
    assert is_finite(tensor)
    assert is_finite(tensor[:, :0])
    tensor[1, 2, 3] = bad
    assert not is_finite(tensor)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32])
def test_slices_of_larger_tensors_can_be_sent(dtype: torch.dtype) -> None:
    column = torch.arange(18).reshape(2, 9).to(dtype)[:, 4:5]
    assert torch.equal(decode_tensor(encode_tensor(column)), column)
