import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from p2pswarm.blocks import packed_weights
from p2pswarm.blocks.column_kernel import DEPTH, MAX_ROWS, MIN_ROWS, ColumnKernel, find_column_kernel
from p2pswarm.blocks.packed_weights import pack_layer


@pytest.fixture
def kernel() -> ColumnKernel:
    found = find_column_kernel()
    if found is None:
        pytest.skip("the kernel cannot be compiled or run here")
    return found


@pytest.mark.usefixtures("threads")
@given(
    rows=st.integers(MIN_ROWS, MAX_ROWS),
    depth=st.integers(1, 20),
    outputs=st.one_of(st.integers(1, 40), st.integers(1000, 2100)),
    seed=st.integers(0, 1000),
)
@settings(deadline=None, max_examples=60)
def test_rows_times_columns_are_their_product(rows: int, depth: int, outputs: int, seed: int) -> None:
    kernel = find_column_kernel()
    if kernel is None:
        pytest.skip("the kernel cannot be compiled or run here")
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(rows, depth * DEPTH, generator=generator)
    columns = torch.randn(depth * DEPTH, outputs, generator=generator)
    truth = states.double() @ columns.double()
    torch.testing.assert_close(kernel.multiply(states, columns).double(), truth, rtol=1e-5, atol=1e-4)


def test_states_that_lie_apart_are_read_as_they_are(kernel: ColumnKernel) -> None:
    states, columns = torch.randn(4, 32)[:, ::2], torch.randn(16, 5)
    torch.testing.assert_close(kernel.multiply(states, columns), states @ columns)


def test_what_is_not_finite_shows_in_its_own_row_only(kernel: ColumnKernel) -> None:
    states, columns = torch.randn(3, 8), torch.randn(8, 4)
    states[1, 2] = float("nan")
    finite = kernel.multiply(states, columns).isfinite()
    assert finite.tolist() == [[True] * 4, [False] * 4, [True] * 4]


@pytest.mark.parametrize(
    ("states", "columns"),
    [
        (torch.randn(1, 8), torch.randn(8, 4)),
        (torch.randn(MAX_ROWS + 1, 8), torch.randn(8, 4)),
        (torch.randn(2, 9), torch.randn(9, 4)),
        (torch.randn(2, 8).double(), torch.randn(8, 4).double()),
        (torch.randn(2, 8), torch.randn(4, 8).t()),
        (torch.randn(2, 8, requires_grad=True), torch.randn(8, 4)),
    ],
    ids=["one row", "many rows", "odd inputs", "another dtype", "stored by rows", "gradients wanted"],
)
def test_it_is_not_for(kernel: ColumnKernel, states: torch.Tensor, columns: torch.Tensor) -> None:
    assert not kernel.is_for(states, columns)


def test_without_the_kernel_a_packed_layer_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(16, 64).requires_grad_(False)
    states = torch.randn(3, 1, 16)
    expected = layer(states)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    pack_layer(layer)
    torch.set_num_threads(before)
    torch.testing.assert_close(layer(states), expected)
    monkeypatch.setattr(packed_weights, "find_column_kernel", lambda: None)
    torch.testing.assert_close(layer(states), expected)
