"""Which pages a session's rows hold, token by token: growing, rolling back, and sharing between beams.

All rows of a session have the same number of tokens. Beams that come from the same one share its pages; only a page
that is about to be written is copied first, and of it only the tokens that stay. What has to be copied is listed for
whoever has the memory (`kv_pool.py`). Knows nothing of tensors.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from p2pswarm.blocks.pages import PAGE_TOKENS, OutOfPages, PagePool, runs_of


@dataclass(frozen=True, slots=True)
class SlotCopy:
    """Tokens that move: `num_slots` of them, from slot `source` on to slot `target` on. Page p begins at slot
    `p * PAGE_TOKENS`.
    """

    source: int
    target: int
    num_slots: int


def pages_for(num_tokens: int) -> int:
    """How many pages one row of so many tokens takes."""
    return -(-num_tokens // PAGE_TOKENS)


class PageTable:
    """The pages of one row, in the order of its tokens."""

    def __init__(self, pool: PagePool, expected_pages: int) -> None:
        self.pages: list[int] = []
        self._pool = pool
        self._expected_pages = expected_pages

    @property
    def is_contiguous(self) -> bool:
        return not self.pages or self.pages == list(range(self.pages[0], self.pages[0] + len(self.pages)))

    @property
    def is_shared(self) -> bool:
        return any(self._pool.num_holders(page) > 1 for page in self.pages)

    def grow(self, num_pages: int) -> list[SlotCopy]:
        """Takes so many pages more, which must be free: after its last one if it can, else where all of it fits."""
        if not self.pages:
            self._append(num_pages, self._expected_pages)
            return []
        end = self.pages[-1] + 1
        can_stay = self._pool.is_free(end, end + num_pages)
        if not (can_stay and self.is_contiguous) and (start := self._better_place(num_pages)) is not None:
            return self._move(start, num_pages)
        if can_stay:
            self._take(end, end + num_pages)
        else:
            self._append(num_pages, self._expected_pages - len(self.pages))
        return []

    def shrink(self, num_pages: int) -> None:
        """Gives all but the first `num_pages` back."""
        if num_pages < len(self.pages):
            self._renounce()
            given_back = self.pages[num_pages:]
            del self.pages[num_pages:]
            self._pool.give_back(given_back)
            self._claim()

    def own(self, index: int, num_slots: int) -> list[SlotCopy]:
        """Makes page `index` this row's alone; its first `num_slots` tokens are kept."""
        shared = self.pages[index]
        if self._pool.num_holders(shared) == 1:
            return []
        self._renounce()
        before = self.pages[index - 1] + 1 if index else 0
        page = before if index and self._pool.is_free(before, before + 1) else self._pool.lowest_free(1)[0][0]
        self._pool.take(page, page + 1)
        self._pool.give_back([shared])
        self.pages[index] = page
        self._claim()
        return [SlotCopy(shared * PAGE_TOKENS, page * PAGE_TOKENS, num_slots)] if num_slots else []

    def copy(self) -> "PageTable":
        """Another row with the same pages, which both then share."""
        other = PageTable(self._pool, self._expected_pages)
        self._pool.share(self.pages)
        other.pages = list(self.pages)
        return other

    def _better_place(self, num_pages: int) -> int | None:
        """Where the whole row has room to double, or for all that is expected; None if there is no such place."""
        if self.is_shared:
            return None
        new_length = len(self.pages) + num_pages
        return self._pool.find_room(max(new_length, min(self._expected_pages, 2 * new_length)))

    def _move(self, start: int, num_pages: int) -> list[SlotCopy]:
        left = self.pages
        self._renounce()
        self.pages = []
        self._take(start, start + len(left) + num_pages)
        copies, target = [], start
        for run_start, run_end in runs_of(left):
            size = run_end - run_start
            copies.append(SlotCopy(run_start * PAGE_TOKENS, target * PAGE_TOKENS, size * PAGE_TOKENS))
            target += size
        self._pool.give_back(left)
        return copies

    def _append(self, num_pages: int, expected_pages: int) -> None:
        start = self._pool.find_place(num_pages, expected_pages)
        if start is not None:
            self._take(start, start + num_pages)
            return
        for start, end in self._pool.lowest_free(num_pages):
            self._take(start, end)

    def _take(self, start: int, end: int) -> None:
        self._renounce()
        self._pool.take(start, end)
        self.pages.extend(range(start, end))
        self._claim()

    def _claim(self) -> None:
        if self.pages:
            end = self.pages[-1] + 1
            self._pool.claim(end, end + self._expected_pages - len(self.pages))

    def _renounce(self) -> None:
        if self.pages:
            self._pool.renounce(self.pages[-1] + 1)


class PageTables:
    """The pages of a session of `num_rows` rows of equal length."""

    def __init__(self, pool: PagePool, num_rows: int, expected_tokens: int) -> None:
        """`expected_tokens`: what each row may grow to; it may also grow further."""
        self.rows = [PageTable(pool, pages_for(expected_tokens)) for _ in range(num_rows)]
        self._pool = pool
        self._has_shared = False
        self.num_pages = 0
        """Held, each counted once, however many rows share it."""

    def fits(self, position: int, num_tokens: int) -> bool:
        """Whether it holds exactly the pages for `num_tokens` after the first `position`, and shares none."""
        return not self._has_shared and self.num_pages == pages_for(position + num_tokens) * len(self.rows)

    def pages_needed(self, position: int, num_tokens: int, beam_indices: Sequence[int] | None = None) -> int:
        """How many more pages it would hold with room for `num_tokens` after the first `position`; below 0: fewer.

        `position` is not more than it had room for. `beam_indices`: row i becomes what row `beam_indices[i]` is, first.
        """
        wanted, written = pages_for(position + num_tokens), position // PAGE_TOKENS
        if beam_indices is None and not self._has_shared:
            return wanted * len(self.rows) - self.num_pages
        rows = self.rows if beam_indices is None else [self.rows[index] for index in beam_indices]
        if not num_tokens:
            written = wanted
        num_distinct = len({page for row in rows for page in row.pages[:written]})
        return num_distinct + len(rows) * (wanted - written) - self.num_pages

    def make_room(self, position: int, num_tokens: int, beam_indices: Sequence[int] | None = None) -> list[SlotCopy]:
        """Holds exactly the pages for `num_tokens` after the first `position` of each row.

        Returns what is to be copied, in this order. Raises `OutOfPages`, and nothing has changed.
        """
        wanted = pages_for(position + num_tokens)
        num_more = self.pages_needed(position, num_tokens, beam_indices)
        if num_more > self._pool.num_free:
            raise OutOfPages(num_more - self._pool.num_free)
        if beam_indices is not None:
            self._reorder(beam_indices)
        for row in self.rows:
            row.shrink(wanted)
        copies: list[SlotCopy] = []
        if num_tokens and self._has_shared:
            copies += self._own_from(position)
        for row in self.rows:
            if len(row.pages) < wanted:
                copies += row.grow(wanted - len(row.pages))
        self.num_pages += num_more
        self._has_shared = self._has_shared and self.num_pages < wanted * len(self.rows)
        return copies

    def release(self) -> None:
        """Gives all pages back; a second time does nothing."""
        for row in self.rows:
            row.shrink(0)
        self.num_pages = 0

    def _reorder(self, beam_indices: Sequence[int]) -> None:
        rows = [self.rows[index].copy() for index in beam_indices]
        for row in self.rows:
            row.shrink(0)
        self.rows = rows
        self._has_shared = True

    def _own_from(self, position: int) -> Iterable[SlotCopy]:
        """Makes the pages from `position` on each row's own: they are about to be written."""
        for row in self.rows:
            for index in range(position // PAGE_TOKENS, len(row.pages)):
                yield from row.own(index, max(0, position - index * PAGE_TOKENS))
