import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from p2pswarm.blocks.attention_kernel import AttentionKernel, find_attention_kernel

NUM_SLOTS = 300


@pytest.fixture
def kernel() -> AttentionKernel:
    found = find_attention_kernel()
    if found is None:
        pytest.skip("the kernel cannot be compiled or run here")
    return found


def by_torch(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, runs: torch.Tensor, scale: float
) -> torch.Tensor:
    shared = queries.shape[1] // keys.shape[0]
    outputs = []
    for query, first, number in zip(queries, *runs.tolist(), strict=True):
        row_keys, row_values = (
            stored[:, first : first + number].repeat_interleave(shared, 0).double() for stored in (keys, values)
        )
        outputs.append(F.scaled_dot_product_attention(query.double(), row_keys, row_values, scale=scale))
    return torch.stack(outputs).transpose(1, 2)


@pytest.mark.usefixtures("threads")
@given(
    runs=st.lists(
        st.integers(0, NUM_SLOTS - 1).flatmap(
            lambda first: st.tuples(st.just(first), st.integers(1, NUM_SLOTS - first))
        ),
        min_size=1,
        max_size=6,
    ),
    key_heads=st.integers(1, 3),
    shared=st.integers(1, 4),
    size=st.sampled_from([8, 24, 64, 128]),
    spread=st.sampled_from([0.1, 1.0, 20.0]),
    seed=st.integers(0, 1000),
)
@settings(deadline=None, max_examples=60)
def test_each_row_attends_to_its_own_run(
    runs: list[tuple[int, int]], key_heads: int, shared: int, size: int, spread: float, seed: int
) -> None:
    kernel = find_attention_kernel()
    if kernel is None:
        pytest.skip("the kernel cannot be compiled or run here")
    generator = torch.Generator().manual_seed(seed)
    queries = spread * torch.randn(len(runs), key_heads * shared, 1, size, generator=generator)
    keys, values = (torch.randn(key_heads, NUM_SLOTS, size, generator=generator) for _ in range(2))
    places = torch.tensor(runs).t().contiguous()
    truth = by_torch(queries, keys, values, places, size**-0.5)
    output = kernel.attend(queries, keys, values, places, size**-0.5)
    torch.testing.assert_close(output.double(), truth, rtol=1e-4, atol=1e-5)


def test_what_is_not_finite_shows_in_its_own_row_only(kernel: AttentionKernel) -> None:
    queries, keys, values = torch.randn(3, 2, 1, 8), torch.randn(2, 40, 8), torch.randn(2, 40, 8)
    keys[:, 15] = float("nan")
    runs = torch.tensor([[0, 10, 20], [10, 10, 20]])
    finite = kernel.attend(queries, keys, values, runs, 1.0).isfinite().all(-1)
    assert finite.tolist() == [[[True, True]], [[False, False]], [[True, True]]]


@pytest.mark.parametrize(
    ("queries", "keys", "values"),
    [
        (torch.randn(1, 2, 1, 8).double(), torch.randn(2, 4, 8), torch.randn(2, 4, 8)),
        (torch.randn(1, 2, 1, 12), torch.randn(2, 4, 12), torch.randn(2, 4, 12)),
        (torch.randn(1, 2, 1, 8), torch.randn(2, 4, 8), torch.randn(2, 4, 16)),
        (torch.randn(1, 3, 1, 8), torch.randn(2, 4, 8), torch.randn(2, 4, 8)),
        (torch.randn(1, 2, 1, 8), torch.randn(4, 2, 8).transpose(0, 1), torch.randn(2, 4, 8)),
    ],
    ids=["another dtype", "an odd size", "other values", "heads left over", "another order"],
)
def test_it_is_not_for(
    kernel: AttentionKernel, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
) -> None:
    assert not kernel.is_for(queries, keys, values)
