"""The KV cache is never promised twice, and what is given back can be promised again."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from p2pswarm.core.errors import ServerBusy
from swarmd.memory import (
    MAX_DEFAULT_CACHE_TOKENS,
    MIN_DEFAULT_CACHE_TOKENS,
    CacheBudget,
    Reservation,
    default_cache_tokens,
)


def test_a_session_over_some_blocks_takes_their_part() -> None:
    budget = CacheBudget(1000, num_blocks=10)
    whole = budget.reserve(500, num_blocks=10)
    assert budget.tokens_left == 500
    budget.reserve(1000, num_blocks=5)
    assert budget.tokens_left == 0
    with pytest.raises(ServerBusy, match="no room for 1 tokens of KV cache over 1 blocks: 0 of 10000 are left"):
        budget.reserve(1, num_blocks=1)
    budget.release(whole)
    budget.release(whole)
    assert budget.tokens_left == 500
    assert budget.num_reservations == 1


class BudgetMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.budget = CacheBudget(100, num_blocks=3)
        self.held: list[tuple[Reservation, int]] = []
        self.released: list[Reservation] = []

    @property
    def promised(self) -> int:
        return sum(size for _, size in self.held)

    @rule(tokens=st.integers(1, 120), num_blocks=st.integers(1, 3))
    def reserve(self, tokens: int, num_blocks: int) -> None:
        size = tokens * num_blocks
        if self.promised + size > 300:
            with pytest.raises(ServerBusy):
                self.budget.reserve(tokens, num_blocks)
        else:
            self.held.append((self.budget.reserve(tokens, num_blocks), size))

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        if self.held:
            reservation, _ = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
            self.budget.release(reservation)
            self.released.append(reservation)

    @rule(data=st.data())
    def release_again(self, data: st.DataObject) -> None:
        if self.released:
            self.budget.release(data.draw(st.sampled_from(self.released)))

    @invariant()
    def what_is_left_is_what_is_not_promised(self) -> None:
        assert self.budget.tokens_left == (300 - self.promised) // 3
        assert self.budget.num_reservations == len(self.held)


TestBudgetMachine = BudgetMachine.TestCase
TestBudgetMachine.settings = settings(deadline=None, max_examples=50)


def test_the_default_follows_the_free_memory_within_bounds() -> None:
    gib = 1 << 30
    assert default_cache_tokens(4 * gib, bytes_per_token=1 << 20) == MIN_DEFAULT_CACHE_TOKENS
    assert default_cache_tokens(16 * gib, bytes_per_token=1 << 20) == 4096
    assert default_cache_tokens(64 * gib, bytes_per_token=1 << 10) == MAX_DEFAULT_CACHE_TOKENS
