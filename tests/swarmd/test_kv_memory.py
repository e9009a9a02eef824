"""Who gets into the KV memory and who has to leave: never more pages than there are, the oldest always goes on, and no
peer keeps more than its share from others.
"""

from functools import partial

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from p2pswarm.blocks.page_tables import PageTables, pages_for
from p2pswarm.blocks.pages import PAGE_TOKENS, PagePool
from p2pswarm.core.errors import ServerBusy, SessionLost
from p2pswarm.core.ids import PeerId
from swarmd.memory import KVMemory, Tenant

NUM_PAGES = 24


class User:
    """A session that only counts."""

    def __init__(
        self,
        memory: KVMemory,
        pool: PagePool,
        num_rows: int,
        max_length: int,
        first_tokens: int,
        owner: str | None = None,
    ) -> None:
        self.tables = PageTables(pool, num_rows, max_length)
        self.tenant = memory.come(num_rows, max_length, first_tokens, owner=None if owner is None else PeerId(owner))
        self.tenant.count_pages = lambda: self.tables.num_pages
        self.tenant.give_up_pages = self.tables.release
        self.memory = memory
        self.max_length = max_length
        self.length = 0
        self.was_inside = self.tenant.is_inside

    def grow(self, num_tokens: int) -> None:
        num_tokens = min(num_tokens, self.max_length - self.length)
        self.memory.take(self.tenant, partial(self.tables.make_room, self.length, num_tokens))
        self.length += num_tokens

    def leave(self) -> None:
        self.tables.release()
        self.memory.leave(self.tenant)


def make_memory() -> tuple[KVMemory, PagePool]:
    pool = PagePool(NUM_PAGES)
    return KVMemory(pool), pool


def test_what_could_never_finish_is_refused_at_once() -> None:
    memory, pool = make_memory()
    with pytest.raises(
        ServerBusy, match=r"no room for 3 x 257 tokens of KV cache, by pages of 32: all of it holds 768"
    ):
        User(memory, pool, 3, 257, 0)
    assert User(memory, pool, 3, 256, 256).tenant.is_inside


def test_promises_count_until_they_are_taken() -> None:
    memory, pool = make_memory()
    user = User(memory, pool, 1, 700, 10 * PAGE_TOKENS)
    assert memory.tokens_left == 14 * PAGE_TOKENS
    user.grow(4 * PAGE_TOKENS)
    assert memory.tokens_left == 14 * PAGE_TOKENS
    user.grow(8 * PAGE_TOKENS)
    assert memory.tokens_left == 12 * PAGE_TOKENS
    assert not User(memory, pool, 1, 700, 11 * PAGE_TOKENS).tenant.is_inside  # two pages have to stay free
    user.leave()
    user.leave()
    assert memory.num_queued == 0


def test_those_who_wait_get_in_in_the_order_in_which_they_came() -> None:
    memory, pool = make_memory()
    first = User(memory, pool, 1, 700, 20 * PAGE_TOKENS)
    large, small = User(memory, pool, 1, 700, 10 * PAGE_TOKENS), User(memory, pool, 1, 700, PAGE_TOKENS)
    let_in: list[str] = []
    large.tenant.get_in = lambda: let_in.append("large")
    small.tenant.get_in = lambda: let_in.append("small")
    assert not small.tenant.is_inside  # though there is room for it
    first.leave()
    assert let_in == ["large", "small"]


def test_who_gives_up_waiting_lets_the_next_one_in() -> None:
    memory, pool = make_memory()
    User(memory, pool, 1, 700, 20 * PAGE_TOKENS)
    large, small = User(memory, pool, 1, 700, 10 * PAGE_TOKENS), User(memory, pool, 1, 700, PAGE_TOKENS)
    large.leave()
    assert small.tenant.is_inside


def test_the_youngest_leaves_even_if_it_is_the_one_that_asks() -> None:
    memory, pool = make_memory()
    oldest, middle, youngest = (User(memory, pool, 1, 700, 0) for _ in range(3))
    oldest.grow(10 * PAGE_TOKENS)
    middle.grow(10 * PAGE_TOKENS)
    with pytest.raises(SessionLost):
        youngest.grow(5 * PAGE_TOKENS)
    oldest.grow(5 * PAGE_TOKENS)
    assert (oldest.tenant.is_inside, middle.tenant.is_inside) == (True, False)
    assert memory.num_evicted == 2


def test_a_forward_pass_leaves_before_any_session() -> None:
    memory, pool = make_memory()
    tables = PageTables(pool, 1, 320)
    forward = memory.come(1, 320, 320, is_session=False)
    forward.count_pages, forward.give_up_pages = lambda: tables.num_pages, tables.release
    memory.take(forward, partial(tables.make_room, 0, 320))
    session = User(memory, pool, 1, 700, 0)
    session.grow(20 * PAGE_TOKENS)
    assert (forward.is_inside, session.tenant.is_inside) == (False, True)


def test_a_peer_that_reserves_everything_makes_way_for_another() -> None:
    memory, pool = make_memory()
    greedy = [User(memory, pool, 1, 700, 6 * PAGE_TOKENS, "greedy") for _ in range(6)]
    assert [user.tenant.is_inside for user in greedy] == [True, True, True, False, False, False]
    modest = User(memory, pool, 1, 700, 10 * PAGE_TOKENS, "modest")
    assert not modest.tenant.is_inside
    memory.make_way()
    assert modest.tenant.is_inside
    assert [user.tenant.is_inside for user in greedy] == [True, True, False, False, False, False]
    modest.grow(10 * PAGE_TOKENS)


def test_a_peer_with_too_much_loses_its_youngest_before_a_younger_one_of_another_leaves() -> None:
    memory, pool = make_memory()
    older, old = (User(memory, pool, 1, 700, 0, "greedy") for _ in range(2))
    older.grow(8 * PAGE_TOKENS)
    old.grow(8 * PAGE_TOKENS)
    young = User(memory, pool, 1, 700, 0, "modest")
    young.grow(10 * PAGE_TOKENS)
    assert [user.tenant.is_inside for user in (older, old, young)] == [True, False, True]


def test_who_would_have_more_than_its_share_waits_behind_the_others() -> None:
    memory, pool = make_memory()
    User(memory, pool, 1, 700, 11 * PAGE_TOKENS, "first")
    User(memory, pool, 1, 700, 0, "second").grow(10 * PAGE_TOKENS)
    greedy = User(memory, pool, 1, 700, 3 * PAGE_TOKENS, "first")
    modest = User(memory, pool, 1, 700, PAGE_TOKENS, "second")
    assert (greedy.tenant.is_inside, modest.tenant.is_inside) == (False, True)


def test_nobody_makes_way_for_who_would_have_more_than_its_share() -> None:
    memory, pool = make_memory()
    large = User(memory, pool, 1, 768, 0, "first")
    large.grow(14 * PAGE_TOKENS)
    larger = User(memory, pool, 1, 768, 13 * PAGE_TOKENS, "second")
    memory.make_way()
    assert (large.tenant.is_inside, larger.tenant.is_inside) == (True, False)
    large.leave()
    assert larger.tenant.is_inside


def test_one_peer_alone_may_have_everything() -> None:
    memory, pool = make_memory()
    user = User(memory, pool, 1, 768, 0, "alone")
    user.grow(768)
    assert user.tenant.is_inside


def test_many_peers_share_by_equal_parts() -> None:
    memory, pool = make_memory()
    owners = [User(memory, pool, 1, 700, 0, f"peer {number}") for number in range(8)]
    second = User(memory, pool, 1, 700, 0, "peer 0")
    for user in owners[1:]:
        user.grow(2 * PAGE_TOKENS)
    owners[0].grow(4 * PAGE_TOKENS)
    second.grow(3 * PAGE_TOKENS)
    owners[7].grow(4 * PAGE_TOKENS)
    assert not second.tenant.is_inside
    assert all(user.tenant.is_inside for user in owners)


def test_the_only_session_of_a_peer_may_have_more_than_an_equal_part() -> None:
    memory, pool = make_memory()
    owners = [User(memory, pool, 1, 700, 0, f"peer {number}") for number in range(8)]
    for user in owners[1:]:
        user.grow(2 * PAGE_TOKENS)
    owners[0].grow(7 * PAGE_TOKENS)
    with pytest.raises(SessionLost):
        owners[7].grow(4 * PAGE_TOKENS)
    assert [user.tenant.is_inside for user in owners] == 7 * [True] + [False]


class MemoryMachine(RuleBasedStateMachine):
    """Sessions of a few peers come, grow, go back, make way and leave in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.memory, self.pool = make_memory()
        self.users: list[User] = []

    @rule(
        num_rows=st.integers(1, 3),
        max_length=st.integers(1, 300),
        first=st.integers(0, 300),
        owner=st.sampled_from([None, "a", "b", "c"]),
    )
    def come(self, num_rows: int, max_length: int, first: int, owner: str | None) -> None:
        if num_rows * pages_for(max_length) <= NUM_PAGES:
            self.users.append(User(self.memory, self.pool, num_rows, max_length, min(first, max_length), owner))

    @rule()
    def make_way(self) -> None:
        inside = [user for user in self.users if user.tenant.is_inside]
        had_too_much = {user for user in inside if self.claimed(user) > NUM_PAGES // 2}
        self.memory.make_way()
        assert all(user.tenant.is_inside or user in had_too_much for user in inside)

    def claimed(self, user: User) -> int:
        """By the user's peer; with up to four peers, half of all is too much."""
        return sum(other.tenant.num_claimed for other in self.users if other.tenant.owner == user.tenant.owner)

    @precondition(lambda self: any(user.tenant.is_inside for user in self.users))
    @rule(data=st.data(), num_tokens=st.integers(1, 100))
    def grow(self, data: st.DataObject, num_tokens: int) -> None:
        inside = [user for user in self.users if user.tenant.is_inside]
        user = data.draw(st.sampled_from(inside))
        holders = [other.tenant for other in inside if other.tables.num_pages]
        is_oldest = all(user.tenant.seniority <= tenant.seniority for tenant in holders)
        needed = len(user.tables.rows) * pages_for(min(user.length + num_tokens, user.max_length))
        may_have_too_much = self.claimed(user) + needed > NUM_PAGES // 2
        try:
            user.grow(num_tokens)
        except SessionLost:
            assert not is_oldest or may_have_too_much
            assert not user.tenant.is_inside

    @precondition(lambda self: self.users)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        self.users.pop(data.draw(st.integers(0, len(self.users) - 1))).leave()

    @invariant()
    def all_pages_are_accounted_for(self) -> None:
        assert self.pool.num_used == sum(user.tables.num_pages for user in self.users) <= NUM_PAGES
        assert all(user.tables.num_pages == 0 for user in self.users if not user.tenant.is_inside)

    @invariant()
    def nobody_waits_outside_an_empty_house(self) -> None:
        assert self.memory.num_tenants or not self.memory.num_queued

    def teardown(self) -> None:
        for user in self.users:
            user.leave()
        assert self.pool.num_free == NUM_PAGES
        assert self.memory.tokens_left == self.memory.total_tokens
        assert (self.memory.num_tenants, self.memory.num_queued) == (0, 0)


TestMemoryMachine = MemoryMachine.TestCase
TestMemoryMachine.settings = settings(deadline=None, max_examples=100)


def test_a_tenant_that_is_gone_keeps_nobody_alive() -> None:
    memory, pool = make_memory()
    user = User(memory, pool, 1, 100, 0)
    tenant: Tenant = user.tenant
    user.leave()
    assert tenant.count_pages() == 0
    tenant.give_up_pages()
