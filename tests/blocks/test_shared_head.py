"""Tokens of threads that find the head busy go through it together, and each thread gets its own."""

import copy
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

from p2pswarm.blocks.column_kernel import MAX_ROWS, find_column_kernel
from p2pswarm.blocks.packed_weights import ColumnLinear, pack_layer
from p2pswarm.blocks.shared_head import SharedHead, share_head

INPUTS, OUTPUTS = 64, 640
WAIT_S = 10.0

pytestmark = pytest.mark.skipif(find_column_kernel() is None, reason="needs AVX2 and a C compiler")


@pytest.fixture
def head() -> Iterator[SharedHead]:
    torch.manual_seed(0)
    layer = nn.Linear(INPUTS, OUTPUTS).requires_grad_(False)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    pack_layer(layer)
    share_head(layer)
    assert isinstance(layer, SharedHead)
    yield layer
    torch.set_num_threads(num_threads)


@pytest.fixture
def rows_at_once(head: SharedHead, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows went through together, each time."""
    rows: list[int] = []
    plain = ColumnLinear.forward

    def counted(layer: ColumnLinear, states: torch.Tensor) -> torch.Tensor:
        rows.append(states.numel() // INPUTS)
        return plain(layer, states)

    monkeypatch.setattr(ColumnLinear, "forward", counted)
    return rows


def call_at_once(head: SharedHead, states: list[torch.Tensor]) -> list[torch.Tensor | Exception]:
    """Each in a thread of its own, while the head is busy; then it is free."""
    answers: dict[int, torch.Tensor | Exception] = {}

    def call(index: int) -> None:
        try:
            answers[index] = head(states[index])
        except ValueError as error:
            answers[index] = error

    threads = [threading.Thread(target=call, args=(index,)) for index in range(len(states))]
    with head.queue.turn:
        for thread in threads:
            thread.start()
        wait_until(lambda: len(head.queue.waiting) == len(states))
    for thread in threads:
        thread.join(WAIT_S)
    return [answers[index] for index in range(len(states))]


def wait_until(is_so: Callable[[], bool]) -> None:
    never = threading.Event()
    for _ in range(int(WAIT_S * 1000)):
        if is_so():
            return
        never.wait(0.001)
    pytest.fail("the threads did not come")


def expected(head: SharedHead, states: torch.Tensor) -> torch.Tensor:
    return (states.double() @ head.weight.double().t() + head.bias.double()).float()


def test_those_who_wait_go_together_and_get_their_own(head: SharedHead, rows_at_once: list[int]) -> None:
    states = [torch.randn(1, 1, INPUTS) for _ in range(MAX_ROWS + 4)]
    answers = call_at_once(head, states)
    assert rows_at_once == [MAX_ROWS, 4]
    for one, answer in zip(states, answers, strict=True):
        assert isinstance(answer, torch.Tensor)
        assert answer.shape == (1, 1, OUTPUTS)
        torch.testing.assert_close(answer, expected(head, one))


def test_a_thread_alone_takes_its_turn_at_once(head: SharedHead, rows_at_once: list[int]) -> None:
    states = torch.randn(1, INPUTS)
    torch.testing.assert_close(head(states), expected(head, states))
    assert rows_at_once == [1]
    assert head.queue.waiting == []


def test_prompts_and_batches_do_not_wait(head: SharedHead) -> None:
    states = torch.randn(3, 2, INPUTS)
    with head.queue.turn:
        torch.testing.assert_close(head(states), expected(head, states))


def test_gradients_pass(head: SharedHead) -> None:
    states = torch.randn(1, INPUTS, requires_grad=True)
    head(states).sum().backward()
    assert states.grad is not None
    torch.testing.assert_close(states.grad, head.weight.sum(0, keepdim=True))


def test_one_that_fails_fails_alone(head: SharedHead, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = ColumnLinear.forward
    calls = iter(range(9))

    def fails_at_first(layer: ColumnLinear, states: torch.Tensor) -> torch.Tensor:
        if next(calls) == 0:
            raise ValueError("no memory left")
        return plain(layer, states)

    monkeypatch.setattr(ColumnLinear, "forward", fails_at_first)
    states = [torch.randn(1, INPUTS) for _ in range(3)]
    answers = call_at_once(head, states)
    assert [isinstance(answer, ValueError) for answer in answers].count(True) == 1
    for one, answer in zip(states, answers, strict=True):
        if isinstance(answer, torch.Tensor):
            torch.testing.assert_close(answer, expected(head, one))
    assert head.queue.waiting == []


def test_a_copy_has_a_queue_of_its_own(head: SharedHead) -> None:
    other = copy.deepcopy(head)
    states = torch.randn(1, INPUTS)
    with head.queue.turn:
        torch.testing.assert_close(other(states), expected(head, states))


def test_other_layers_stay_what_they_are() -> None:
    layer = nn.Linear(INPUTS, OUTPUTS)
    share_head(layer)
    assert type(layer) is nn.Linear
