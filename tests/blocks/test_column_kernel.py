from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from p2pswarm.blocks import packed_weights
from p2pswarm.blocks.column_kernel import LINE, MAX_ROWS, ColumnKernel, find_column_kernel, new_columns
from p2pswarm.blocks.packed_weights import pack_layer


@pytest.fixture
def kernel() -> ColumnKernel:
    found = find_column_kernel()
    if found is None:
        pytest.skip("the kernel cannot be compiled or run here")
    return found


@pytest.fixture
def one_thread() -> Iterator[None]:
    """So few that layers are packed."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@given(
    rows=st.integers(1, MAX_ROWS),
    inputs=st.integers(1, 100),
    outputs=st.one_of(st.integers(1, 100), st.integers(1000, 2100)),
    is_padded=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(deadline=None, max_examples=60)
def test_rows_times_columns_are_their_product(rows: int, inputs: int, outputs: int, is_padded: bool, seed: int) -> None:
    kernel = find_column_kernel()
    if kernel is None:
        pytest.skip("the kernel cannot be compiled or run here")
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(rows, inputs, generator=generator)
    columns = new_columns(inputs, outputs) if is_padded else torch.empty(inputs, outputs)
    columns.normal_(generator=generator)
    truth = states.double() @ columns.double()
    torch.testing.assert_close(kernel.multiply(states, columns).double(), truth, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_it_errs_no_further_than_torch_does(kernel: ColumnKernel, rows: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(2000, 1536)
    columns = new_columns(1536, 2000).copy_(weight.t())
    own_error = torch_error = 0.0
    for states in torch.randn(20, rows, 1536):
        truth = states.double() @ weight.double().t()
        own_error += float((kernel.multiply(states, columns) - truth).square().mean())
        torch_error += float((F.linear(states, weight) - truth).square().mean())
    assert own_error < 1.3 * torch_error


def test_states_that_lie_apart_are_read_as_they_are(kernel: ColumnKernel) -> None:
    states, columns = torch.randn(4, 32)[:, ::2], torch.randn(16, 5)
    torch.testing.assert_close(kernel.multiply(states, columns), states @ columns)


@pytest.mark.parametrize("shape", [(8,), (1, 8), (2, 1, 8), (2, 3, 8)])
def test_the_output_has_the_shape_of_the_states(kernel: ColumnKernel, shape: tuple[int, ...]) -> None:
    states, columns = torch.randn(*shape), torch.randn(8, 5)
    torch.testing.assert_close(kernel.multiply(states, columns), states @ columns)


def test_what_is_not_finite_shows_in_its_own_row_only(kernel: ColumnKernel) -> None:
    states, columns = torch.randn(3, 8), torch.randn(8, 4)
    states[1, 2] = float("nan")
    finite = kernel.multiply(states, columns).isfinite()
    assert finite.tolist() == [[True] * 4, [False] * 4, [True] * 4]


@pytest.mark.parametrize(
    ("states", "columns"),
    [
        (torch.randn(0, 8), torch.randn(8, 4)),
        (torch.randn(MAX_ROWS + 1, 8), torch.randn(8, 4)),
        (torch.randn(2, 8).double(), torch.randn(8, 4).double()),
        (torch.randn(2, 8), torch.randn(4, 8).t()),
        (torch.randn(2, 8, requires_grad=True), torch.randn(8, 4)),
        (torch.randn(2, 8), torch.randn(8, 4, requires_grad=True)),
    ],
    ids=["no row", "many rows", "another dtype", "stored by rows", "gradients wanted", "training"],
)
def test_it_is_not_for(kernel: ColumnKernel, states: torch.Tensor, columns: torch.Tensor) -> None:
    assert not kernel.is_for(states, columns)


@pytest.mark.parametrize("outputs", [1, 16, 576, 3072, 49152, 50257])
def test_rows_of_new_columns_do_not_compete_for_one_place_in_a_cache(outputs: int) -> None:
    columns = new_columns(3, outputs)
    assert columns.shape == (3, outputs)
    assert columns.stride(1) == 1
    assert columns.stride(0) % (2 * LINE) == LINE


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("num_tokens", [1, 3, MAX_ROWS + 1])
def test_without_the_kernel_a_packed_layer_computes_the_same(monkeypatch: pytest.MonkeyPatch, num_tokens: int) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(16, 64).requires_grad_(False)
    states = torch.randn(num_tokens, 1, 16)
    expected = layer(states)
    pack_layer(layer)
    torch.testing.assert_close(layer(states), expected)
    monkeypatch.setattr(packed_weights, "find_column_kernel", lambda: None)
    torch.testing.assert_close(layer(states), expected)


@pytest.mark.usefixtures("one_thread")
def test_gradients_go_through_a_packed_layer() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(16, 8).requires_grad_(False)
    states = torch.randn(3, 16, requires_grad=True)
    (expected,) = torch.autograd.grad(layer(states).square().sum(), states)
    pack_layer(layer)
    (gradient,) = torch.autograd.grad(layer(states).square().sum(), states)
    torch.testing.assert_close(gradient, expected)
