"""Keeps a node that cannot be dialled reachable through two relays, while there are as many, and finds others when one
goes.

Whom to ask is decided in `relay_choice.py`; one place on one relay is a `reservation.Reservation`. What the addresses
are good for is the caller's affair: it is told whenever they change.
"""

import logging
from collections.abc import Awaitable, Callable, Iterable

import trio

from p2pswarm.core.errors import NetworkError, RemoteError
from p2pswarm.core.ids import PeerId
from p2pswarm.net.nat.relay_choice import RelayCandidate, RelayChoice
from p2pswarm.net.nat.reservation import Reservation
from p2pswarm.net.network import Network

NUM_RELAYS = 2
"""So that clients have another way at once when one dies."""
LOOK_PERIOD_S = 1.0
"""Between two looks for candidates, while there are too few relays."""

logger = logging.getLogger(__name__)


class RelayKeeper:
    """Works while `run` does."""

    def __init__(
        self,
        network: Network,
        reserve: Callable[[PeerId], Awaitable[Reservation]],
        find_candidates: Callable[[], Iterable[RelayCandidate]],
        on_reserved: Callable[[PeerId], None],
        on_lost: Callable[[PeerId, str], None],
    ) -> None:
        """`on_lost` gets the reason too. Both are called when `addresses` has changed."""
        self._network = network
        self._find_candidates = find_candidates
        self._on_reserved = on_reserved
        self._on_lost = on_lost
        self._reserve = reserve
        self._choice = RelayChoice()
        self._held: dict[PeerId, Reservation] = {}
        self._kept: dict[PeerId, RelayCandidate] = {}
        self._has_fewer = trio.Event()

    @property
    def addresses(self) -> tuple[str, ...]:
        """Those of the relays for others to dial us by, without our peer id; the relay held longest first."""
        return tuple(address for reservation in self._held.values() for address in reservation.addresses)

    async def run(self) -> None:
        """Until cancelled; the places are given back then, without a word to `on_lost`."""
        try:
            async with trio.open_nursery() as nursery:
                while True:
                    self._has_fewer = trio.Event()
                    candidates = self._find_candidates()
                    kept = self._kept.values()
                    for relay in self._choice.next_relays(candidates, kept, NUM_RELAYS, trio.current_time()):
                        self._kept[relay.peer_id] = relay
                        nursery.start_soon(self._keep, relay)
                    has_all = len(self._kept) >= NUM_RELAYS
                    with trio.move_on_after(float("inf") if has_all else LOOK_PERIOD_S):
                        await self._has_fewer.wait()
        finally:
            self._held.clear()
            self._kept.clear()

    async def _keep(self, relay: RelayCandidate) -> None:
        reservation = await self._ask(relay)
        if reservation is not None:
            self._choice.accepted(relay.peer_id)
            self._held[relay.peer_id] = reservation
            self._on_reserved(relay.peer_id)
            why = await reservation.hold()
            self._choice.lost(relay.peer_id, trio.current_time())
            del self._held[relay.peer_id]
            self._on_lost(relay.peer_id, why)
        del self._kept[relay.peer_id]
        self._has_fewer.set()

    async def _ask(self, relay: RelayCandidate) -> Reservation | None:
        self._network.add_addresses(relay.peer_id, relay.addresses)
        try:
            return await self._reserve(relay.peer_id)
        except (NetworkError, RemoteError) as error:
            logger.info("%s does not relay for us: %s", relay.peer_id, error)
            self._choice.refused(relay.peer_id, trio.current_time())
            return None
