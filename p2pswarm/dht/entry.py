"""The way into the swarm: the peers we were given and those that answered once, asked all at once until one answers."""

from collections.abc import Sequence

import trio

from p2pswarm.core.errors import ConfigError
from p2pswarm.core.ids import PeerId
from p2pswarm.dht.background import Background
from p2pswarm.dht.config import DhtConfig
from p2pswarm.dht.contact import Contact
from p2pswarm.dht.known_peers import KnownPeers, contacts_at
from p2pswarm.dht.neighbours import Neighbours
from p2pswarm.net.addresses import split_peer_address

MAX_GREETED_AT_ONCE = 16


class PointsOfEntry:
    """Whom to turn to when nobody else is left."""

    def __init__(self, neighbours: Neighbours, known: KnownPeers, background: Background, config: DhtConfig) -> None:
        self._neighbours = neighbours
        self._known = known
        self._background = background
        self._config = config
        self._given: dict[PeerId, Contact] = {}
        self.failures: list[str] = []
        """Why those greeted last did not answer, each."""

    def give(self, addresses: Sequence[str]) -> None:
        """Takes up peers from outside the DHT. Raises `ConfigError` for an address that cannot be dialled."""
        own_peer_id = self._neighbours.own_peer_id
        for address in addresses:
            _, peer_id = split_peer_address(address)
            if peer_id != own_peer_id and not contacts_at([address]):
                raise ConfigError(f"a peer's address must be one that can be dialled, got {address!r}")
        self._given |= {
            contact.peer_id: contact for contact in contacts_at(addresses) if contact.peer_id != own_peer_id
        }

    def contacts(self) -> list[Contact]:
        """The given peers, then the known ones, the latest first."""
        known = [contact for contact in self._known.contacts() if contact.peer_id not in self._given]
        return [*self._given.values(), *known]

    async def greet(self) -> bool:
        """Whether one of them answered, within `bootstrap_timeout_s`; those slower than the first enter the table
        later."""
        first_answer, end = trio.Event(), trio.Event()
        failures = self.failures = []
        turns = trio.CapacityLimiter(MAX_GREETED_AT_ONCE)

        async def greet_one(contact: Contact) -> None:
            async with turns:
                failure = await self._neighbours.greet(contact)
            if failure is not None:
                failures.append(failure)
                return
            first_answer.set()
            end.set()

        async def greet_all() -> None:
            async with trio.open_nursery() as nursery:
                for contact in self.contacts():
                    nursery.start_soon(greet_one, contact)
            end.set()

        self._background.start_soon(greet_all)
        with trio.move_on_after(self._config.bootstrap_timeout_s):
            await end.wait()
        return first_answer.is_set()
