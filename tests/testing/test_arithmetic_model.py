"""The model that counts: the same answer however it is cut, and another one after any mistake with its tokens."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from p2pswarm.core.span import Span
from p2pswarm.testing.arithmetic_model import MODULUS, Tokens, run_blocks, run_blocks_back

ALL = Span(0, 6)
ROWS = st.lists(st.integers(0, MODULUS - 1), min_size=2, max_size=12)


def text(rows: list[list[int]]) -> Tokens:
    return Tokens.none(len(rows)).followed_by(torch.tensor(rows, dtype=torch.float32)[:, :, None], None, None)


@given(row=ROWS, cut=st.integers(1, 5))
def test_it_does_not_matter_where_the_blocks_are_cut(row: list[int], cut: int) -> None:
    middle = run_blocks(Span(0, cut), text([row]))
    got = run_blocks(Span(cut, 6), Tokens.none(1).followed_by(middle, None, None))
    assert torch.equal(got, run_blocks(ALL, text([row])))


@given(row=ROWS, index=st.integers(0, 11), change=st.integers(1, MODULUS - 1))
def test_a_wrong_token_shows_from_there_on(row: list[int], index: int, change: int) -> None:
    index %= len(row)
    wrong = [*row[:index], (row[index] + change) % MODULUS, *row[index + 1 :]]
    same = run_blocks(ALL, text([row])) == run_blocks(ALL, text([wrong]))
    assert same[0, :index].all()
    assert not same[0, index]
    assert not same.all()


def test_padding_and_position_ids_count() -> None:
    tokens = torch.tensor([[[5.0], [7.0], [9.0]]])
    plain = run_blocks(ALL, text([[5, 7, 9]]))
    padded = Tokens.none(1).followed_by(tokens, torch.tensor([[False, True, True]]), None)
    moved = Tokens.none(1).followed_by(tokens, None, torch.tensor([[0, 1, 3]]))
    assert (run_blocks(ALL, padded)[0, 1:] != plain[0, 1:]).all()
    assert (run_blocks(ALL, moved) == plain).flatten().tolist() == [True, True, False]


def test_rows_know_nothing_of_one_another_and_can_be_reordered() -> None:
    two = text([[1, 2, 3], [4, 5, 6]])
    assert torch.equal(run_blocks(ALL, two)[1:], run_blocks(ALL, text([[4, 5, 6]])))
    swapped = two.reordered(torch.tensor([1, 1]))
    assert torch.equal(run_blocks(ALL, swapped), run_blocks(ALL, text([[4, 5, 6], [4, 5, 6]])))


def back(rows: list[list[int]], gradients: list[list[int]], blocks: Span = ALL) -> torch.Tensor:
    given, _ = run_blocks_back(blocks, text(rows), torch.tensor(gradients, dtype=torch.float32)[:, :, None])
    return given


@given(row=ROWS, seed=st.integers(0, MODULUS - 1), cut=st.integers(1, 5))
def test_it_does_not_matter_where_the_blocks_are_cut_on_the_way_back(row: list[int], seed: int, cut: int) -> None:
    gradients = torch.tensor([[(seed * (index + 1)) % MODULUS for index in range(len(row))]]).float()[:, :, None]
    whole, _ = run_blocks_back(ALL, text([row]), gradients)
    middle = Tokens.none(1).followed_by(run_blocks(Span(0, cut), text([row])), None, None)
    of_middle, _ = run_blocks_back(Span(cut, 6), middle, gradients)
    first, _ = run_blocks_back(Span(0, cut), text([row]), of_middle)
    assert torch.equal(first, whole)


@given(row=ROWS, index=st.integers(0, 11), change=st.integers(1, MODULUS - 1))
def test_a_wrong_gradient_or_input_shows_on_the_way_back(row: list[int], index: int, change: int) -> None:
    index %= len(row)
    wrong = [*row[:index], (row[index] + change) % MODULUS, *row[index + 1 :]]
    right = back([row], [row])
    assert not torch.equal(back([row], [wrong]), right)
    assert not torch.equal(back([wrong], [row]), right)
    assert torch.equal(back([row], [wrong])[0, index + 1 :], right[0, index + 1 :])


def test_prompts_count_at_each_block_and_get_gradients_over_all_rows() -> None:
    tokens, two_blocks = text([[1, 2, 3], [4, 5, 6]]), Span(2, 4)
    prompts = torch.tensor([[[10.0], [20.0]], [[30.0], [40.0]]])
    entered = run_blocks(Span(2, 3), text([[11, 22, 3], [14, 25, 6]]))
    entered[:, :2] += prompts[1]
    wanted = run_blocks(Span(3, 4), Tokens.none(2).followed_by(entered % MODULUS, None, None))
    assert torch.equal(run_blocks(two_blocks, tokens, prompts), wanted)
    given, of_prompts = run_blocks_back(two_blocks, tokens, torch.ones(2, 3, 1), prompts)
    assert of_prompts is not None
    assert torch.equal(of_prompts[0], given[:, :2].sum(dim=0))
    assert of_prompts.shape == prompts.shape


def test_prompts_longer_than_the_rows_get_no_gradient_beyond_them() -> None:
    prompts = torch.ones(1, 5, 1)
    given, of_prompts = run_blocks_back(Span(0, 1), text([[1, 2]]), torch.ones(1, 2, 1), prompts)
    assert of_prompts is not None
    assert of_prompts[0, :, 0].tolist() == [*given[0, :, 0].tolist(), 0, 0, 0]
