"""Pages are counted exactly, whatever sessions do; what they are told to copy keeps every row's tokens."""

from collections.abc import Callable, Sequence

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from p2pswarm.blocks.page_tables import PageTable, PageTables, SlotCopy, pages_for
from p2pswarm.blocks.pages import PAGE_TOKENS, OutOfPages, PagePool

NUM_PAGES = 24


class Session:
    """A session's page tables, and the tokens each of its rows should read."""

    def __init__(self, pool: PagePool, num_rows: int, expected_tokens: int) -> None:
        self.tables = PageTables(pool, num_rows, expected_tokens)
        self.rows: list[list[int]] = [[] for _ in range(num_rows)]

    @property
    def length(self) -> int:
        return len(self.rows[0])

    def slots(self, row: int, start: int, end: int) -> list[int]:
        pages = self.tables.rows[row].pages
        return [pages[token // PAGE_TOKENS] * PAGE_TOKENS + token % PAGE_TOKENS for token in range(start, end)]


class SessionsOverOnePool(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(0)
        self.memory: list[int] = []
        self.sessions: list[Session] = []
        self.next_token = 0

    @initialize(first_part=st.integers(0, NUM_PAGES))
    def make_the_pool(self, first_part: int) -> None:
        self.pool.extend(first_part)
        self.pool.extend(NUM_PAGES - first_part)
        self.memory = [-1] * NUM_PAGES * PAGE_TOKENS

    @rule(num_rows=st.integers(1, 4), expected_tokens=st.integers(0, 20 * PAGE_TOKENS))
    def open_session(self, num_rows: int, expected_tokens: int) -> None:
        self.sessions.append(Session(self.pool, num_rows, expected_tokens))

    @precondition(lambda self: self.sessions)
    @rule(data=st.data())
    def step(self, data: st.DataObject) -> None:
        session = data.draw(st.sampled_from(self.sessions))
        back = data.draw(st.just(0) | st.integers(0, session.length))
        position, num_tokens = session.length - back, data.draw(st.integers(0, 3) | st.integers(0, 5 * PAGE_TOKENS))
        num_rows = len(session.rows)
        indices = st.lists(st.integers(0, num_rows - 1), min_size=num_rows, max_size=num_rows)
        beams = data.draw(st.none() | indices)

        before = [list(row.pages) for row in session.tables.rows]
        needed, free = session.tables.pages_needed(position, num_tokens, beams), self.pool.num_free
        if needed > free:
            with pytest.raises(OutOfPages) as raised:
                session.tables.make_room(position, num_tokens, beams)
            assert raised.value.num_missing == needed - free
            assert [row.pages for row in session.tables.rows] == before
            assert self.pool.num_free == free
            return
        copies = session.tables.make_room(position, num_tokens, beams)
        assert self.pool.num_free == free - needed
        if session.tables.fits(position, num_tokens):
            assert session.tables.pages_needed(position, num_tokens) == 0
        self._copy(copies)
        self._write(session, position, num_tokens, beams)

    def _copy(self, copies: Sequence[SlotCopy]) -> None:
        for each in copies:
            kept = self.memory[each.source : each.source + each.num_slots]
            self.memory[each.target : each.target + each.num_slots] = kept

    def _write(self, session: Session, position: int, num_tokens: int, beams: list[int] | None) -> None:
        session.rows = [session.rows[i][:position] for i in beams or range(len(session.rows))]
        for index, row in enumerate(session.rows):
            for slot in session.slots(index, position, position + num_tokens):
                self.memory[slot] = self.next_token
                row.append(self.next_token)
                self.next_token += 1

    @precondition(lambda self: self.sessions)
    @rule(data=st.data())
    def close_session(self, data: st.DataObject) -> None:
        session = self.sessions.pop(data.draw(st.integers(0, len(self.sessions) - 1)))
        session.tables.release()
        session.tables.release()

    @invariant()
    def every_row_reads_its_own_tokens(self) -> None:
        for session in self.sessions:
            for index, row in enumerate(session.rows):
                assert [self.memory[slot] for slot in session.slots(index, 0, len(row))] == row

    @invariant()
    def pages_are_counted_exactly(self) -> None:
        held = [{page for row in session.tables.rows for page in row.pages} for session in self.sessions]
        assert sum(map(len, held)) == len(set().union(*held)) == self.pool.num_used
        for session, pages in zip(self.sessions, held, strict=True):
            assert session.tables.num_pages == len(pages)
            assert all(len(row.pages) == pages_for(session.length) for row in session.tables.rows)

    def teardown(self) -> None:
        for session in self.sessions:
            session.tables.release()
        assert self.pool.num_free == self.pool.num_pages
        assert self.pool.is_free(0, self.pool.num_pages) or not self.pool.num_pages
        assert not self.pool._claims


SessionsOverOnePool.TestCase.settings = settings(deadline=None, max_examples=60, stateful_step_count=40)
TestSessionsOverOnePool = SessionsOverOnePool.TestCase


def grown(pool: PagePool, num_pages: int, expected_pages: int) -> PageTable:
    row = PageTable(pool, expected_pages)
    row.grow(num_pages)
    return row


def test_a_new_row_leaves_the_ones_before_it_room_to_grow() -> None:
    pool = PagePool(20)
    first, second, third = (grown(pool, 1, 8) for _ in range(3))

    assert [row.pages for row in (first, second)] == [[0], [8]]
    assert third.pages == [14], "half of what is left is the second row's"


def test_the_lowest_pages_are_used_first() -> None:
    pool = PagePool(100)
    first, second = grown(pool, 3, 5), grown(pool, 2, 2)
    first.shrink(0)

    assert second.pages == [5, 6]
    assert grown(pool, 1, 4).pages == [0]


def test_a_row_that_cannot_grow_where_it_is_moves_to_where_it_can() -> None:
    pool = PagePool(12)
    row, neighbour = grown(pool, 2, 2), grown(pool, 1, 1)

    copies = row.grow(1)

    assert (row.pages, neighbour.pages) == ([3, 4, 5], [2])
    assert copies == [SlotCopy(0, 3 * PAGE_TOKENS, 2 * PAGE_TOKENS)]
    assert pool.is_free(0, 2)


def test_a_row_with_no_better_place_goes_on_elsewhere_and_gathers_itself_later() -> None:
    pool = PagePool(8)
    row, neighbour, third = grown(pool, 2, 2), grown(pool, 1, 1), grown(pool, 3, 3)
    assert row.grow(1) == []
    assert row.pages == [0, 1, 6]
    assert not row.is_contiguous

    for each in (neighbour, third):
        each.shrink(0)
    copies = row.grow(1)

    assert row.pages == [2, 3, 4, 5]
    assert [(copy.source, copy.target, copy.num_slots) for copy in copies] == [
        (0, 2 * PAGE_TOKENS, 2 * PAGE_TOKENS),
        (6 * PAGE_TOKENS, 4 * PAGE_TOKENS, PAGE_TOKENS),
    ]


@pytest.mark.parametrize(
    "misuse",
    [lambda pool: pool.take(1, 3), lambda pool: pool.give_back([2]), lambda pool: pool.share([2])],
    ids=["taken twice", "given back twice", "shared though free"],
)
def test_a_page_is_never_anybodys_by_mistake(misuse: Callable[[PagePool], None]) -> None:
    pool = PagePool(3)
    pool.take(0, 2)

    with pytest.raises(AssertionError, match="free"):
        misuse(pool)


def test_beams_share_all_but_the_page_they_write() -> None:
    pool = PagePool(40)
    tables = PageTables(pool, 4, 10 * PAGE_TOKENS)
    tables.make_room(0, 5 * PAGE_TOKENS + 7)
    assert tables.num_pages == pool.num_used == 4 * 6

    copies = tables.make_room(5 * PAGE_TOKENS + 7, 1, [2, 2, 2, 2])

    assert tables.num_pages == pool.num_used == 5 + 4
    assert [copy.num_slots for copy in copies] == [7, 7, 7]
    assert len({copy.source for copy in copies}) == 1
