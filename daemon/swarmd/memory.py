"""Who gets into the KV memory, who waits, and who has to leave when it is full. Pure: pages are only counted here.

Sessions take pages as they grow (`blocks/kv_cache.py`), not for all that they may come to. So more of them fit than if
each were promised its longest length, and memory may run out:

- **In.** A session that could not finish alone is refused. Others get in when the pages for the tokens that they will
  send at once are free, with some to spare for those inside to grow; in the order in which they came.
- **Out.** When there are no pages left, the youngest of those inside is evicted, perhaps the one that asks: its client
  replays, here or elsewhere. So the oldest always goes on, and nothing can wait in a circle.
- **Shared.** Where several peers want room, none may keep more than half of it, nor, with more than one session, more
  than twice an equal part. Who has more is evicted before all others, also for one who waits at the door; who would
  have more waits behind them. A peer's only session is left alone, since its replay would cost more than is gained.

Long forward passes hold pages too while they run, and are the first to be evicted. `docs/decisions/11-kv-memory.md`
has the reasons.
"""

import math
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass

from p2pswarm.blocks.page_tables import pages_for
from p2pswarm.blocks.pages import PAGE_TOKENS, OutOfPages, PagePool
from p2pswarm.core.errors import ServerBusy, SessionLost
from p2pswarm.core.ids import PeerId

SPARE_SHARE = 1 / 16
"""Of all pages: what has to stay free when another session gets in. Without it, one that has just replayed all its
tokens would be evicted at the next page that somebody needs."""
MAX_SHARE = 1 / 2
MAX_EQUAL_PARTS = 2
"""One peer's part of all pages while others want some: at most that share, and with several sessions at most so many
equal parts."""
MAX_QUEUE = 256
"""Sessions that wait to get in."""


class Tenant:
    """A session, or a long forward pass, that is inside or waits to get in."""

    def __init__(self, number: int, first_pages: int, owner: PeerId | None, *, is_session: bool) -> None:
        self.number = number
        """Rises: the youngest has the highest."""
        self.owner = owner
        self.first_pages = first_pages
        self.is_session = is_session
        self.count_pages: Callable[[], int]
        """How many it holds."""
        self.get_in: Callable[[], None]
        """Called when it gets in after it had to wait."""
        self.give_up_pages: Callable[[], None]
        """Called when it is evicted: it must hold none any more."""
        self.forget()

    def forget(self) -> None:
        """It is not inside, and knows nobody who would keep it alive."""
        self.is_inside = False
        self.count_pages = lambda: 0
        self.get_in = self.give_up_pages = lambda: None

    @property
    def num_promised(self) -> int:
        """Pages that it was let in for and has not taken yet."""
        return max(0, self.first_pages - self.count_pages())

    @property
    def num_claimed(self) -> int:
        """Pages that it holds or was promised."""
        return self.count_pages() + self.num_promised

    @property
    def seniority(self) -> tuple[bool, int]:
        """The highest is evicted first."""
        return not self.is_session, self.number


@dataclass(slots=True)
class _Claim:
    """What one peer has inside."""

    num_tenants: int = 0
    num_pages: int = 0


class KVMemory:
    """The pages of one pool. Only for the trio thread, and changed only while the device is idle."""

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self._inside: dict[int, Tenant] = {}
        self._queue: deque[Tenant] = deque()
        self._num_come = 0
        self._num_evicted = 0

    @property
    def total_tokens(self) -> int:
        return self._pool.num_pages * PAGE_TOKENS

    @property
    def tokens_left(self) -> int:
        """Tokens for which there is room, and which nobody was promised."""
        return max(0, self._num_unpromised) * PAGE_TOKENS

    @property
    def num_tenants(self) -> int:
        return len(self._inside)

    @property
    def num_queued(self) -> int:
        return len(self._queue)

    @property
    def num_evicted(self) -> int:
        """Since the start."""
        return self._num_evicted

    def come(
        self,
        num_rows: int,
        max_length: int,
        first_tokens: int,
        *,
        owner: PeerId | None = None,
        is_session: bool = True,
    ) -> Tenant:
        """A new tenant, inside or in the queue; it evicts nobody. Raises `ServerBusy` for one that could never finish.

        `owner`: for whom it is; with None for nobody in particular, as others are.
        """
        if num_rows * pages_for(max_length) > self._pool.num_pages:
            raise ServerBusy(
                f"no room for {num_rows} x {max_length} tokens of KV cache, by pages of {PAGE_TOKENS}: "
                f"all of it holds {self.total_tokens}"
            )
        if len(self._queue) >= MAX_QUEUE:
            raise ServerBusy(f"{len(self._queue)} sessions are waiting for room in the KV cache already")
        self._num_come += 1
        first_pages = num_rows * pages_for(max(first_tokens, 1))
        tenant = Tenant(self._num_come, first_pages, owner, is_session=is_session)
        self._queue.append(tenant)
        self._let_in_who_fits()
        return tenant

    def take(self, tenant: Tenant, take_pages: Callable[[], object]) -> None:
        """Calls `take_pages`, which raises `OutOfPages` where too few are free, and evicts others until it succeeds.

        Raises `SessionLost` when it is the tenant itself that had to leave.
        """
        has_evicted = False
        while tenant.is_inside:
            try:
                take_pages()
            except OutOfPages:
                self._evict(self._who_leaves(tenant))
                has_evicted = True
            else:
                assert self._pool.num_used <= self._pool.num_pages
                break
        if has_evicted:
            self._let_in_who_fits()
        self.make_way()
        if not tenant.is_inside:
            raise SessionLost("the KV memory is full, and this session had to make room for others")

    def make_way(self) -> None:
        """Evicts whose peers have more than their share, for those who wait and would not."""
        while self._next_modest() is not None:
            greedy = [tenant for tenant in self._greedy() if tenant.num_claimed]
            if not greedy:
                break
            self._evict(max(greedy, key=lambda tenant: tenant.seniority))
            self._let_in_who_fits()

    def leave(self, tenant: Tenant) -> None:
        """The tenant is gone, wherever it was; a second time does nothing. It must have given its pages back."""
        if self._inside.pop(tenant.number, None) is None and tenant in self._queue:
            self._queue.remove(tenant)
        tenant.forget()
        self._let_in_who_fits()

    @property
    def _num_unpromised(self) -> int:
        return self._pool.num_free - sum(tenant.num_promised for tenant in self._inside.values())

    def _has_room_for(self, tenant: Tenant) -> bool:
        """Alone, a tenant needs no pages to spare."""
        spare = math.ceil(SPARE_SHARE * self._pool.num_pages) if self._inside else 0
        return tenant.first_pages + spare <= self._num_unpromised

    def _let_in_who_fits(self) -> None:
        """One after the other; nobody overtakes, except those who would have more than their share."""
        while self._queue:
            tenant = self._next_modest() or self._queue[0]
            if not self._has_room_for(tenant):
                break
            self._queue.remove(tenant)
            tenant.is_inside = True
            self._inside[tenant.number] = tenant
            tenant.get_in()

    def _next_modest(self) -> Tenant | None:
        """The first in the queue whose peer would not have more than its share with it."""
        if not self._queue:
            return None
        claims = self._claims()

        def is_modest(tenant: Tenant) -> bool:
            claim = claims[tenant.owner]
            return claim.num_pages + tenant.first_pages <= self._limit(len(claims), claim.num_tenants + 1)

        return next(filter(is_modest, self._queue), None)

    def _greedy(self) -> list[Tenant]:
        """All of the one peer inside that has most, of those that have more than their share."""
        claims = self._claims()
        greedy = [
            (claim.num_pages, owner)
            for owner, claim in claims.items()
            if claim.num_pages > self._limit(len(claims), claim.num_tenants)
        ]
        if not greedy:
            return []
        _, greediest = max(greedy, key=lambda claimed: claimed[0])
        return [tenant for tenant in self._inside.values() if tenant.owner == greediest]

    def _limit(self, num_owners: int, num_tenants: int) -> float:
        """How many pages one of so many peers may claim that has so many tenants inside."""
        if num_owners < 2:
            return math.inf
        share = MAX_SHARE if num_tenants < 2 else min(MAX_SHARE, MAX_EQUAL_PARTS / num_owners)
        return share * self._pool.num_pages

    def _claims(self) -> defaultdict[PeerId | None, "_Claim"]:
        """Of each peer that is inside or waits."""
        claims: defaultdict[PeerId | None, _Claim] = defaultdict(_Claim)
        for tenant in self._queue:
            claims.setdefault(tenant.owner, _Claim())
        for tenant in self._inside.values():
            claim = claims[tenant.owner]
            claim.num_tenants += 1
            claim.num_pages += tenant.num_claimed
        return claims

    def _who_leaves(self, asking: Tenant) -> Tenant:
        """The youngest of those whose leaving helps, and the one that asks; first of a peer with too much."""
        candidates = [tenant for tenant in self._inside.values() if tenant is asking or tenant.count_pages()]
        greedy = [tenant for tenant in self._greedy() if tenant in candidates]
        return max(greedy or candidates, key=lambda tenant: tenant.seniority)

    def _evict(self, tenant: Tenant) -> None:
        del self._inside[tenant.number]
        tenant.is_inside = False
        self._num_evicted += 1
        tenant.give_up_pages()
        assert tenant.count_pages() == 0
