"""How others reach this node: found out by asking them, arranged where need be, and told.

    start    join as a node that only those hear of whom it asks -> ask some of them to dial us
    public   serve the DHT, announce where we listen, and where they got through
    private  keep places on two relays, announce those, and be a client of the DHT; meanwhile ask the router to forward
             a port, and the peers again
    later    ask again every few minutes, soon after a surprise, at once when this machine's addresses change

Nobody to ask means unknown, which is taken for public: the first node of a swarm cannot know better. Who is told by its
operator where it can be dialled asks nobody. What the answers mean is decided in `p2pswarm/net/nat/`.
"""

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from random import Random

import trio

from p2pswarm.core.clock import Clock
from p2pswarm.core.ids import PeerId
from p2pswarm.core.reachability import Reachability
from p2pswarm.core.server_info import ServerInfo
from p2pswarm.dht.node import DhtNode
from p2pswarm.net.nat.own_addresses import addresses_to_publish, dial_back_ports
from p2pswarm.net.nat.port_mapping import PortMapper
from p2pswarm.net.nat.probing import Probing, ask_peers, whom_to_ask
from p2pswarm.net.nat.reachability import AGREEING_PROBERS, ProbeReport, ReachabilityState
from p2pswarm.net.nat.relay import HOME_LIMITS, Relay
from p2pswarm.net.nat.relay_choice import RelayCandidate
from p2pswarm.net.nat.relay_keeper import RelayKeeper
from p2pswarm.net.nat.relay_limits import RelayLimits
from p2pswarm.net.nat.reservation import reserve
from p2pswarm.net.network import Network
from swarmd.config import NodeConfig
from swarmd.events import Events

LOOK_PERIOD_S = 2.0
"""Between two looks whether this machine's addresses have changed, or somebody has come whom we can ask."""
FIRST_RELAY_TIMEOUT_S = 5.0
"""A server is not announced before it can be reached; it is after this long."""

logger = logging.getLogger(__name__)


class Reaching:
    """`run` all the time; `settle` once, when the node has joined."""

    def __init__(
        self,
        config: NodeConfig,
        host: Network,
        dht: DhtNode,
        clock: Clock,
        random: Random,
        events: Events,
        find_port_mapper: Callable[[Random], PortMapper] = PortMapper,
    ) -> None:
        self._config = config
        self._host = host
        self._dht = dht
        self._random = random
        self._events = events
        self._state = ReachabilityState()
        self._is_told = bool(config.announce or config.public_ip)
        limits = HOME_LIMITS if config.relay_rate is None else RelayLimits(rate_bytes_per_s=config.relay_rate)
        self._relay = Relay(host, clock, limits)
        self._keeper = RelayKeeper(
            host, partial(reserve, host), self._relay_candidates, self._note_relay_reserved, self._note_relay_lost
        )
        self._mapper = None if config.no_upnp else find_port_mapper(random)
        self._num_asked = 0
        self._has_asked_router = False
        self._served: tuple[bool, tuple[str, ...]] | None = None
        self._has_asked = trio.Event()
        self._has_relay = trio.Event()
        self._settled = trio.Event()
        self._changed = trio.Event()

    # What others of this node ask

    @property
    def reachability(self) -> Reachability:
        return self._state.reachability

    @property
    def next_change(self) -> trio.Event:
        """Set when `stamped` has become another; ask for the next one then."""
        return self._changed

    async def wait_settled(self) -> None:
        """Returns once it is known, as far as it can be, how others reach us: before, nothing should be announced."""
        await self._settled.wait()

    def stamped(self, info: ServerInfo) -> ServerInfo:
        """The announcement with where we are reached now."""
        is_private = self.reachability is Reachability.PRIVATE
        return replace(
            info, addresses=self._host.addresses, using_relay=is_private, reachability=self._state.reachability
        )

    # Life

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serves those who ask us, and keeps our own place true, until cancelled."""
        Probing(self._host).serve()
        if not self._config.no_relay:
            self._relay.serve()
        task_status.started()
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._keep_relays_while_private)
                await self._has_asked.wait()
                while not self._is_told:
                    await self._try_router()
                    await self._wait_for_reason()
                    await self._check()
        finally:
            if self._mapper is not None:
                await self._mapper.unmap()

    async def settle(self) -> None:
        """Finds out, once there is somebody to ask, and has others find us accordingly."""
        if self._is_told:
            await self._take_operators_word()
        else:
            await self._check()
        self._has_asked.set()
        if self.reachability is Reachability.PRIVATE:
            with trio.move_on_after(FIRST_RELAY_TIMEOUT_S):
                await self._has_relay.wait()
        self._settled.set()

    async def _take_operators_word(self) -> None:
        if self._config.public_ip is not None:
            kind = "ip6" if ":" in self._config.public_ip else "ip4"
            ports = {address.port for address in self._host.own_listen_addresses() if address.kind == kind}
            self._host.publish([f"/{kind}/{self._config.public_ip}/tcp/{port}" for port in sorted(ports)])
        self._state = ReachabilityState(Reachability.PUBLIC)
        self._tell("its operator says so")
        await self._serve_accordingly()

    async def _wait_for_reason(self) -> None:
        """Returns when it is time to ask again."""
        listening = self._host.own_listen_addresses()
        due_s = trio.current_time() + self._state.next_check_s(self._random)
        while trio.current_time() < due_s:
            await trio.sleep(LOOK_PERIOD_S)
            if self._host.own_listen_addresses() != listening:
                logger.info("this machine's addresses have changed: asking again whether it can be dialled")
                self._state = self._state.after_move()
                self._has_asked_router = False
                return
            if self._num_asked < AGREEING_PROBERS and len(self._prober_hosts()) > self._num_asked:
                return
            if self._mapper is not None and self._mapper.mapped is not None and self._mapper.is_due:
                await self._mapper.map(self._mapper.mapped.internal)

    async def _check(self) -> None:
        before = self._state
        reports = await self._ask()
        self._state = self._state.after(reports)
        if self.reachability is not Reachability.PRIVATE:
            self._has_asked_router = False
        self._publish()
        if self._state.reachability is not before.reachability or self._state.confirmed != before.confirmed:
            num_reached = sum(bool(report.reached_ports) for report in reports)
            self._tell(f"{num_reached} of {len(reports)} peers got through")
        await self._serve_accordingly()

    async def _try_router(self) -> None:
        """Where we cannot be dialled, has a router forward a port, and asks whether that helps. Once, and again when
        its port has led here and does no longer."""
        if self._mapper is None or self._has_asked_router or self.reachability is not Reachability.PRIVATE:
            return
        self._has_asked_router = True
        ports = [address.port for address in self._host.own_listen_addresses() if address.kind == "ip4"]
        if ports and await self._mapper.map(ports[0]) is not None:
            self._state = self._state.after_move()
            await self._check()

    def _tell(self, why: str) -> None:
        addresses = list(self._host.addresses)
        self._events("reachability", state=self.reachability.value, why=why, addresses=addresses)

    async def _serve_accordingly(self) -> None:
        """Has the DHT's nodes know us, or not, at our addresses."""
        serving = (self.reachability is not Reachability.PRIVATE, self._host.addresses)
        if serving != self._served:
            self._served = serving
            await self._dht.set_serving(serving[0])

    # Asking

    async def _ask(self) -> list[ProbeReport]:
        forwarded = self._mapper.mapped.external if self._mapper is not None and self._mapper.mapped else None
        ports = dial_back_ports(self._host.own_listen_addresses(), forwarded)
        hosts = self._prober_hosts()
        self._num_asked = len(hosts)
        return await ask_peers(self._host, whom_to_ask(hosts, self._random), ports)

    def _prober_hosts(self) -> dict[PeerId, str]:
        """Nodes of the DHT, and the machine of each."""
        return {contact.peer_id: contact.addresses[0].split("/")[2] for contact in self._dht.contacts()}

    # Relays

    async def _keep_relays_while_private(self) -> None:
        while True:
            await self._wait_private(True)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._keeper.run)
                await self._wait_private(False)
                nursery.cancel_scope.cancel()

    async def _wait_private(self, is_private: bool) -> None:
        while (self.reachability is Reachability.PRIVATE) is not is_private:
            await self._changed.wait()

    def _relay_candidates(self) -> list[RelayCandidate]:
        return [
            RelayCandidate(contact.peer_id, contact.addresses, self._host.round_trip_s(contact.peer_id))
            for contact in self._dht.contacts()
        ]

    def _note_relay_reserved(self, relay_id: PeerId) -> None:
        self._publish()
        self._has_relay.set()
        self._events("relay_reserved", relay=relay_id, addresses=list(self._host.addresses))

    def _note_relay_lost(self, relay_id: PeerId, why: str) -> None:
        self._publish()
        self._events("relay_lost", relay=relay_id, message=why)

    def _publish(self) -> None:
        listening, circuits = self._host.own_listen_addresses(), self._keeper.addresses
        self._host.publish(addresses_to_publish(self.reachability, self._state.confirmed, listening, circuits))
        changed, self._changed = self._changed, trio.Event()
        changed.set()
