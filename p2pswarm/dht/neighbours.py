"""The nodes around us: whom we know, who answers, who does not; and the asking itself.

Every answer and every silence passes through here, so that the table, the verdicts and the known peers stay true.
Where to go from there is for `dht/walk.py`, `dht/node.py` and `dht/upkeep.py`.
"""

import logging
from collections import OrderedDict
from collections.abc import Iterable
from typing import TypeVar

import trio

from p2pswarm.core.errors import NetworkError, NotAMember, ProtocolViolation, RemoteError
from p2pswarm.core.ids import PeerId
from p2pswarm.dht.background import Background
from p2pswarm.dht.bad_peers import BadPeers
from p2pswarm.dht.config import DhtConfig
from p2pswarm.dht.contact import Contact, closest, node_id_of, usable_addresses
from p2pswarm.dht.known_peers import KnownPeers
from p2pswarm.dht.links import Links
from p2pswarm.dht.messages import Envelope, FindNode, FoundNodes, Ping, Pong, Reply, Request
from p2pswarm.dht.table import PeerTable
from p2pswarm.net.network import Network

MAX_NEWCOMERS = 256
"""Waiting for records to be handed over; those beyond wait for the owners' renewals instead."""
MAX_HEARD_OF = 1024
"""Contacts that others named and we never asked: a lookup that starts from them saves a hop, which is worth a dial."""
OWN_ADDRESSES_S = 15.0
"""How long our addresses are taken for true: finding them means asking the system for its interfaces."""

ReplyT = TypeVar("ReplyT", bound=Reply)

logger = logging.getLogger(__name__)


class Neighbours:
    """Contacts, and opinions on them."""

    def __init__(self, network: Network, known: KnownPeers, background: Background, config: DhtConfig) -> None:
        self._network = network
        self._known = known
        self._background = background
        self._config = config
        self.links = Links(network, config)
        self.table = PeerTable(node_id_of(network.peer_id), config.k)
        self.bad_peers = BadPeers(config.bad_peer_s, config.max_bad_peer_s)
        self.serves = config.serve and bool(network.addresses)
        """Whether others are told where we are, so that they ask us too."""
        self.num_asked = 0
        self.num_unanswered = 0
        self._heard_of: OrderedDict[PeerId, Contact] = OrderedDict()
        self._own_addresses: tuple[str, ...] = ()
        self._own_addresses_until_s = 0.0
        self._being_tested: set[PeerId] = set()
        self._newcomers: dict[PeerId, Contact] = {}
        self._changed = trio.Event()

    @property
    def own_peer_id(self) -> PeerId:
        return self._network.peer_id

    @property
    def own_addresses(self) -> tuple[str, ...]:
        """What we tell others of where we are; nothing when we do not serve."""
        if not self.serves:
            return ()
        if trio.current_time() >= self._own_addresses_until_s:
            self._own_addresses = usable_addresses(self._network.peer_id, self._network.addresses)
            self._own_addresses_until_s = trio.current_time() + OWN_ADDRESSES_S
        return self._own_addresses

    def forget_own_addresses(self) -> None:
        """They have changed."""
        self._own_addresses_until_s = 0.0

    async def ask(
        self, contact: Contact, request: Request, wanted: type[ReplyT], timeout_s: float | None = None
    ) -> ReplyT | None:
        """The contact's answer; None where it gave none that makes sense, and is left alone for a while."""
        timeout_s = timeout_s or self._config.request_timeout_s
        if not self.links.is_open(contact.peer_id):
            self._network.add_addresses(contact.peer_id, contact.addresses)
        self.num_asked += 1
        try:
            answer = await self.links.ask(contact.peer_id, request, self.own_addresses, timeout_s)
            if not isinstance(answer.message, wanted):
                got = type(answer.message).__name__
                raise ProtocolViolation(f"{contact.peer_id} answered {got} to {request}", contact.peer_id)
        except (NetworkError, RemoteError, NotAMember) as error:
            logger.debug("%s", error)
            self._gave_no_answer(contact.peer_id)
            return None
        self.heard_from(contact.peer_id, answer)
        if answer.sender_addresses:
            self._known.answered(Contact(contact.peer_id, answer.sender_addresses))
        return answer.message

    async def greet(self, contact: Contact) -> str | None:
        """Dials a contact from outside the DHT, with more patience than `ask` has; why that failed, if it did."""
        failure = "it has no address"
        for address in contact.addresses:
            try:
                await self._network.connect(address)
                failure = f"{address} is not of this swarm's DHT, or does not serve it"
                break
            except (NetworkError, RemoteError, NotAMember) as error:
                logger.debug("%s", error)
                failure = str(error)
        request = FindNode(node_id_of(self.own_peer_id))
        answer = await self.ask(contact, request, FoundNodes, self._config.bootstrap_timeout_s)
        if answer is None:
            return failure
        self.hear_of(answer.contacts)
        return None

    def heard_from(self, peer_id: PeerId, envelope: Envelope) -> None:
        """A sign of life: the peer answered, or asked us something. It is in the table as long as it serves."""
        self.bad_peers.answered(peer_id)
        if not envelope.sender_addresses:
            self._remove(peer_id)
            return
        contact = Contact(peer_id, envelope.sender_addresses)
        self._known.asked_us(contact)
        is_new = peer_id not in self.table
        now_s = trio.current_time()
        in_the_way = self.table.seen(contact, now_s)
        if in_the_way is None and is_new and len(self._newcomers) < MAX_NEWCOMERS:
            self._newcomers[contact.peer_id] = contact
            self._changed.set()
        if in_the_way is not None and in_the_way.seen_at_s < now_s - self._config.trusted_s:
            self._test(in_the_way.contact)

    def settled_contacts(self) -> list[Contact]:
        """Those in the table for so long that they hold what they should."""
        return self.table.came_before(trio.current_time() - self._config.settle_s)

    def hear_of(self, contacts: Iterable[Contact]) -> list[Contact]:
        """Those of a stranger's contacts that are worth asking: not ourselves, and not silent lately."""
        now_s = trio.current_time()
        worth_asking = []
        for contact in contacts:
            if contact.peer_id != self.own_peer_id and not self.bad_peers.is_bad(contact.peer_id, now_s):
                worth_asking.append(contact)
                self._heard_of[contact.peer_id] = contact
                self._heard_of.move_to_end(contact.peer_id)
        while len(self._heard_of) > MAX_HEARD_OF:
            self._heard_of.popitem(last=False)
        return worth_asking

    def closest_heard_of(self, target_id: bytes) -> list[Contact]:
        """The k closest contacts that we know, or only know of: good to start from, not to be told to others."""
        known = {contact.peer_id: contact for contact in self.table.closest(target_id, self._config.k)}
        return closest({**self._heard_of, **known}.values(), target_id, self._config.k)

    def connected_peers(self) -> frozenset[PeerId]:
        return self._network.connected_peers

    @property
    def is_alone(self) -> bool:
        """Whether the table is empty."""
        return not len(self.table)

    async def wait_alone(self) -> None:
        """Returns at once, or as soon as the table is empty."""
        while not self.is_alone:
            await self._wait_changed()

    async def wait_newcomer(self) -> None:
        """Returns when there is something for `take_newcomers`."""
        while not self._newcomers:
            await self._wait_changed()

    def take_newcomers(self) -> list[Contact]:
        """The contacts that have entered the table since the last call."""
        newcomers, self._newcomers = list(self._newcomers.values()), {}
        return newcomers

    def _gave_no_answer(self, peer_id: PeerId) -> None:
        self.num_unanswered += 1
        self.bad_peers.failed(peer_id, trio.current_time())
        self._remove(peer_id)

    def _remove(self, peer_id: PeerId) -> None:
        self._heard_of.pop(peer_id, None)
        was_alone = self.is_alone
        self.table.remove(peer_id)
        if self.is_alone and not was_alone:
            self._changed.set()

    def _test(self, contact: Contact) -> None:
        """Asks the contact for a sign of life, since a newcomer could use its place."""
        if contact.peer_id not in self._being_tested:
            self._being_tested.add(contact.peer_id)
            self._background.start_soon(self._ping, contact)

    async def _ping(self, contact: Contact) -> None:
        try:
            await self.ask(contact, Ping(), Pong)
        finally:
            self._being_tested.discard(contact.peer_id)

    async def _wait_changed(self) -> None:
        if self._changed.is_set():
            self._changed = trio.Event()
        await self._changed.wait()
