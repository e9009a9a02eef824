"""Rows of a tensor as it travels are the rows of the tensor, whatever the codec."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pswarm.wire.codecs import decode_tensor, encode_tensor
from p2pswarm.wire.tensor_rows import joined_rows, rows_of
from p2pswarm.wire.tensors import Codec


@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=5).filter(sum),
    st.sampled_from([(), (3,), (2, 65), (4, 128)]),
    st.sampled_from(Codec),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
@settings(deadline=None)
def test_rows_come_apart_and_together(
    counts: list[int], shape: tuple[int, ...], codec: Codec, dtype: torch.dtype
) -> None:
    whole = encode_tensor(torch.randn(sum(counts), *(shape or (1,))).to(dtype), codec)
    decoded = decode_tensor(whole)
    parts, start = [], 0
    for count in counts:
        part = rows_of(whole, start, start + count)
        assert torch.equal(decode_tensor(part), decoded[start : start + count])
        parts.append(part)
        start += count
    together = joined_rows(parts)
    assert (together.dtype, together.shape, together.codec) == (whole.dtype, whole.shape, codec)
    assert torch.equal(decode_tensor(together), decoded)


def test_rows_lie_on_the_memory_of_the_whole() -> None:
    data = bytearray(4 * 6)
    whole = encode_tensor(torch.frombuffer(data, dtype=torch.float32).view(3, 2))
    row = decode_tensor(rows_of(whole, 1, 2))
    row.fill_(1.0)
    assert bytes(data) == bytes(8) + b"\x00\x00\x80\x3f" * 2 + bytes(8)


@pytest.mark.parametrize("codec", Codec)
def test_all_rows_are_the_tensor_itself(codec: Codec) -> None:
    whole = encode_tensor(torch.randn(3, 4), codec)
    assert rows_of(whole, 0, 3) is whole
    assert joined_rows([whole]) is whole
