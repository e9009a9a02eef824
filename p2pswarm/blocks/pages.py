"""Which pages of a fixed memory are whose: free ones, how often each is held, and where a growing row goes best.

A page is room for `PAGE_TOKENS` tokens in every layer of a pool. Rows (sequences) take pages as they grow. Any page
will do, but attention reads a row fastest where it lies in one piece; so a new row goes where it can grow as far as it
is expected to, and places near the end of a growing row are left to it while there are others.

Pure counting, without tensors and without tokens. Read `page_tables.py` next for what a session holds, and
`kv_pool.py` for the memory itself.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence

PAGE_TOKENS = 32
"""Of 256 tokens the last page wastes 6 % on average; a page less often taken costs less to count."""


class OutOfPages(MemoryError):
    """Fewer pages are free than are needed. Nothing has changed: give some back, and ask again."""

    def __init__(self, num_missing: int) -> None:
        super().__init__(f"{num_missing} more pages of KV memory are needed than are free")
        self.num_missing = num_missing


class PagePool:
    """The pages `0 ... num_pages`. Not for several threads at a time."""

    def __init__(self, num_pages: int) -> None:
        self._num_holders: list[int] = []
        self._gap_starts: list[int] = []
        self._gap_ends: list[int] = []
        """Runs of free pages, in order, never touching one another."""
        self._claims: dict[int, int] = {}
        """By the page after a row's last: how far that row may yet grow."""
        self._num_free = 0
        self.extend(num_pages)

    @property
    def num_pages(self) -> int:
        return len(self._num_holders)

    @property
    def num_free(self) -> int:
        return self._num_free

    @property
    def num_used(self) -> int:
        """Pages that somebody holds, each counted once."""
        return self.num_pages - self._num_free

    def num_holders(self, page: int) -> int:
        return self._num_holders[page]

    def extend(self, num_pages: int) -> None:
        """Adds free pages at the end."""
        if num_pages:
            start = self.num_pages
            self._num_holders.extend([0] * num_pages)
            self._vacate(start, start + num_pages)

    def is_free(self, start: int, end: int) -> bool:
        """Whether all of `[start, end)` could be taken."""
        gap = bisect_right(self._gap_starts, start) - 1
        return gap >= 0 and end <= self._gap_ends[gap]

    def take(self, start: int, end: int) -> None:
        """Holds the free pages `[start, end)`."""
        gap = bisect_right(self._gap_starts, start) - 1
        assert self.is_free(start, end), f"pages {start}:{end} are not free"
        rests = [
            (first, last)
            for first, last in ((self._gap_starts[gap], start), (end, self._gap_ends[gap]))
            if first < last
        ]
        self._gap_starts[gap : gap + 1] = [first for first, _ in rests]
        self._gap_ends[gap : gap + 1] = [last for _, last in rests]
        self._num_holders[start:end] = [1] * (end - start)
        self._num_free -= end - start

    def share(self, pages: Sequence[int]) -> None:
        """Holds pages, that somebody holds, once more."""
        for page in pages:
            assert self._num_holders[page] > 0, f"page {page} is free"
            self._num_holders[page] += 1

    def give_back(self, pages: Sequence[int]) -> None:
        """Lets go of pages; those that nobody else holds become free."""
        freed = []
        for page in pages:
            assert self._num_holders[page] > 0, f"page {page} is free already"
            self._num_holders[page] -= 1
            if self._num_holders[page] == 0:
                freed.append(page)
        for start, end in runs_of(sorted(freed)):
            self._vacate(start, end)

    def claim(self, end: int, claimed_end: int) -> None:
        """Notes that a row which ends before page `end` may grow up to `claimed_end`."""
        if claimed_end > end:
            self._claims[end] = claimed_end

    def renounce(self, end: int) -> None:
        """Forgets what a row that ends before page `end` may grow to."""
        self._claims.pop(end, None)

    def find_room(self, num_pages: int) -> int | None:
        """The first page of the lowest run of so many pages that are free and not where a row is expected to grow."""
        for start, end in zip(self._gap_starts, self._gap_ends, strict=True):
            unclaimed = self._claims.get(start, start)
            if end - unclaimed >= num_pages:
                return unclaimed
        return None

    def find_place(self, num_pages: int, expected_pages: int) -> int | None:
        """Where `num_pages` that will become `expected_pages` go best; None where no gap holds even `num_pages`."""
        start = self.find_room(max(num_pages, expected_pages))
        if start is not None or not self._gap_starts:
            return start
        sizes = [end - start for start, end in zip(self._gap_starts, self._gap_ends, strict=True)]
        largest = max(range(len(sizes)), key=sizes.__getitem__)
        if sizes[largest] < num_pages:
            return None
        start = self._gap_starts[largest]
        # Half of the gap is left to the row before it, if that still grows.
        return start + (sizes[largest] - num_pages) // 2 if start in self._claims else start

    def lowest_free(self, num_pages: int) -> list[tuple[int, int]]:
        """The lowest so many free pages, as runs `[start, end)`."""
        assert num_pages <= self._num_free, f"{num_pages} pages are wanted, {self._num_free} are free"
        runs = []
        for start, end in zip(self._gap_starts, self._gap_ends, strict=True):
            if num_pages == 0:
                break
            taken = min(num_pages, end - start)
            runs.append((start, start + taken))
            num_pages -= taken
        return runs

    def _vacate(self, start: int, end: int) -> None:
        gap = bisect_right(self._gap_starts, start)
        self._num_free += end - start
        if gap < len(self._gap_starts) and self._gap_starts[gap] == end:
            end = self._gap_ends[gap]
            del self._gap_starts[gap], self._gap_ends[gap]
        if gap > 0 and self._gap_ends[gap - 1] == start:
            self._gap_ends[gap - 1] = end
        else:
            self._gap_starts.insert(gap, start)
            self._gap_ends.insert(gap, end)


def runs_of(pages: Sequence[int]) -> Iterator[tuple[int, int]]:
    """The stretches `[start, end)` in which each page follows the one before."""
    start = 0
    for index in range(1, len(pages) + 1):
        if index == len(pages) or pages[index] != pages[index - 1] + 1:
            yield pages[start], pages[index - 1] + 1
            start = index
