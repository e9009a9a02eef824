from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from p2pswarm.blocks import packed_weights
from p2pswarm.blocks.column_kernel import find_column_kernel
from p2pswarm.blocks.packed_weights import MAX_THREADS, ColumnLinear, JoinedLinear, pack_layer, pack_weights

SIZE = 8


@pytest.fixture(autouse=True, params=[1, MAX_THREADS])
def few_threads(request: pytest.FixtureRequest) -> Iterator[None]:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(autouse=True, params=["kernel", "no kernel"])
def has_kernel(request: pytest.FixtureRequest) -> Iterator[bool]:
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "no kernel":
            patch.setattr(packed_weights, "find_column_kernel", lambda: None)
        yield request.param == "kernel" and find_column_kernel() is not None


class Gated(nn.Module):
    """Two layers with one input, and a third after them."""

    def __init__(self, inner: int, *, bias: bool, changes_input: bool = False) -> None:
        super().__init__()
        self.gate = nn.Linear(SIZE, inner, bias=bias)
        self.up = nn.Linear(SIZE, 2 * inner, bias=bias)
        self.down = nn.Linear(2 * inner, SIZE, bias=bias)
        self.changes_input = changes_input

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        gate = F.silu(self.gate(states))
        if self.changes_input:
            states += 1
        output: torch.Tensor = self.down(torch.cat((gate, gate), dim=-1) * self.up(states))
        return output


def gated(inner: int = 6, *, bias: bool = False, changes_input: bool = False) -> Gated:
    torch.manual_seed(0)
    return Gated(inner, bias=bias, changes_input=changes_input).requires_grad_(False)


def pack(model: nn.Module, dtype: torch.dtype = torch.float32) -> None:
    pack_weights(model, lambda: model(torch.ones(1, 1, SIZE, dtype=dtype)))


@given(inner=st.integers(1, 20), bias=st.booleans(), batch_size=st.integers(1, 3), num_tokens=st.integers(0, 5))
@settings(deadline=None, max_examples=50)
def test_a_packed_model_gives_the_answers_it_gave(inner: int, bias: bool, batch_size: int, num_tokens: int) -> None:
    plain, packed = gated(inner, bias=bias), gated(inner, bias=bias)
    pack(packed)
    for states in torch.randn(3, batch_size, num_tokens, SIZE):
        torch.testing.assert_close(packed(states), plain(states), atol=1e-5, rtol=1e-5)


def test_layers_with_one_input_lie_in_one_matrix() -> None:
    model, plain = gated(bias=True), gated(bias=True)
    pack(model)
    assert type(model.gate) is type(model.up) is JoinedLinear
    assert model.gate.weight.untyped_storage().data_ptr() == model.up.weight.untyped_storage().data_ptr()
    for (name, weight), (expected_name, expected) in zip(
        model.named_parameters(), plain.named_parameters(), strict=True
    ):
        assert name == expected_name
        assert torch.equal(weight, expected)


def test_layers_are_not_put_together_when_their_input_changes_between_them() -> None:
    model = gated(changes_input=True)
    pack(model)
    assert type(model.gate) is type(model.up) is nn.Linear


def test_an_input_that_changes_in_place_between_two_tokens_is_seen() -> None:
    model, plain = gated(), gated()
    pack(model)
    states = torch.randn(1, 1, SIZE)
    model(states)
    states.mul_(2)
    torch.testing.assert_close(model(states), plain(states))


def test_a_layer_that_is_called_alone_gets_what_it_asks_for() -> None:
    model, plain = gated(), gated()
    pack(model)
    first, second = torch.randn(2, 1, 1, SIZE)
    model.gate(first)
    torch.testing.assert_close(model.up(second), plain.up(second))
    torch.testing.assert_close(model.up(second), plain.up(second))


def test_layers_that_share_a_weight_are_not_put_together() -> None:
    model = gated()
    model.up = nn.Linear(SIZE, 6, bias=False)
    model.up.weight = model.gate.weight
    states = torch.ones(1, 1, SIZE)
    pack_weights(model, lambda: [layer(states) for layer in (model.gate, model.up)])
    assert type(model.gate) is type(model.up) is nn.Linear
    assert model.up.weight is model.gate.weight


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_left_alone(dtype: torch.dtype) -> None:
    model = gated().to(dtype)
    pack(model, dtype)
    assert all(type(layer) is nn.Linear and layer.weight.is_contiguous() for layer in (model.gate, model.up))


def test_a_model_in_training_is_left_alone() -> None:
    model = gated().requires_grad_(True)
    pack(model)
    assert all(type(layer) is nn.Linear and layer.weight.is_contiguous() for layer in (model.gate, model.up))


def test_a_single_wide_layer_is_stored_by_columns_and_may_be_moved_and_trained() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(512, 1000).requires_grad_(False)
    states = torch.randn(512)
    expected = layer(states)
    pack_layer(layer)
    assert type(layer) is ColumnLinear
    assert layer.weight.stride(0) == 1
    torch.testing.assert_close(layer(states), expected)
    torch.testing.assert_close(layer.double()(states.double()), expected.double(), rtol=1e-5, atol=1e-5)
    layer.requires_grad_(True)(states.double()).sum().backward()
    assert layer.weight.grad is not None


def test_a_high_layer_is_stored_by_columns_where_there_is_the_kernel(has_kernel: bool) -> None:
    model = gated()
    pack(model)
    assert type(model.down) is (ColumnLinear if has_kernel else nn.Linear)
    assert model.down.weight.is_contiguous() is not has_kernel


def test_a_column_is_summed_up_as_exactly_as_a_row() -> None:
    torch.manual_seed(0)
    plain, packed = (nn.Linear(1536, 2000, bias=False).requires_grad_(False) for _ in range(2))
    packed.load_state_dict(plain.state_dict())
    pack_layer(packed)
    row_error = column_error = 0.0
    for states in torch.randn(20, 1, 1536):
        truth = states.double() @ plain.weight.double().t()
        row_error += float((plain(states) - truth).abs().max())
        column_error += float((packed(states) - truth).abs().max())
    assert column_error < 1.3 * row_error


def test_with_more_threads_than_were_measured_all_is_left_alone() -> None:
    torch.set_num_threads(MAX_THREADS + 1)
    model = gated()
    pack(model)
    assert all(type(layer) is nn.Linear for layer in (model.gate, model.up))
