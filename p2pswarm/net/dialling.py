"""From a peer's addresses to a connection with it.

The addresses are tried one after the other with a short head start each, and the first that answers wins; relays come
in when no direct way has been found in a second. Who shares a dial, and when one is needed, is the host's affair.
"""

from collections.abc import Awaitable, Callable, Sequence

import trio

from p2pswarm.core.errors import ConnectionLost, NetworkError, PeerUnreachable, RemoteError
from p2pswarm.core.ids import PeerId
from p2pswarm.net.address_book import AddressBook
from p2pswarm.net.addresses import CircuitAddress, TcpAddress, parse_address
from p2pswarm.net.config import NetworkConfig
from p2pswarm.net.connection import Connection
from p2pswarm.net.local_port import LocalPort
from p2pswarm.net.nat.lanes import LanePipe
from p2pswarm.net.pipe import Pipe, TcpPipe
from p2pswarm.net.upgrade import Upgrader

CIRCUITS_AFTER_S = 1.0
"""Head start of all direct addresses over the relayed ones: a relay's line is somebody else's, and half as fast."""
CIRCUIT_STAGGER_S = 1.0
"""Head start of each relay over the next: several handshakes with it and through it."""


class Dialler:
    """Dials for one node; `adopt` is given each connection at once, `nursery` closes those that came too late."""

    def __init__(
        self,
        upgrader: Upgrader,
        book: AddressBook,
        local_port: LocalPort,
        call_through_relay: Callable[[CircuitAddress, PeerId], Awaitable[Pipe]],
        adopt: Callable[[Connection], None],
        config: NetworkConfig,
        nursery: trio.Nursery,
    ) -> None:
        self._upgrader = upgrader
        self._book = book
        self._local_port = local_port
        self._call_through_relay = call_through_relay
        self._adopt = adopt
        self._config = config
        self._nursery = nursery

    async def dial(self, peer_id: PeerId, *, directly: bool = False) -> Connection:
        """A new connection, adopted already; `directly`, without relays.

        Raises `PeerUnreachable` with the reason at each address.
        """
        addresses = [parse_address(transport) for transport in self._book.get(peer_id)]
        direct = [address for address in addresses if isinstance(address, TcpAddress)]
        circuits = [address for address in addresses if isinstance(address, CircuitAddress) and not directly]
        if not direct and not circuits:
            raise PeerUnreachable(f"no address of {peer_id} is known", peer_id)
        failures: list[str] = []
        with trio.move_on_after(self._config.dial_timeout_s):
            connection = await self._dial_any(peer_id, direct, circuits, failures)
            if connection is not None:
                return connection
        tried = ", ".join(map(str, [*direct, *circuits]))
        reasons = "; ".join(failures) or f"no answer within {self._config.dial_timeout_s} s from {tried}"
        raise PeerUnreachable(f"{peer_id} cannot be reached: {reasons}", peer_id)

    async def _dial_any(
        self,
        peer_id: PeerId,
        direct: Sequence[TcpAddress],
        circuits: Sequence[CircuitAddress],
        failures: list[str],
    ) -> Connection | None:
        """The first connection that comes about."""
        connected: list[Connection] = []

        async def try_one(address: TcpAddress | CircuitAddress, has_failed: trio.Event) -> None:
            try:
                connection = await self._dial_one(peer_id, address)
                connected.append(connection)
                self._book.prove(peer_id, str(address))
                self._adopt(connection)  # now, since what comes next may be cancelled
                nursery.cancel_scope.cancel()
            except (OSError, NetworkError, RemoteError) as error:
                failures.append(f"{address}: {error}")
            finally:
                has_failed.set()

        async def try_all(
            addresses: Sequence[TcpAddress | CircuitAddress], stagger_s: float, have_failed: trio.Event
        ) -> None:
            """Each has a head start over the next, or until it fails."""
            async with trio.open_nursery() as racing:
                for address in addresses:
                    has_failed = trio.Event()
                    racing.start_soon(try_one, address, has_failed)
                    with trio.move_on_after(stagger_s):
                        await has_failed.wait()
            have_failed.set()

        async with trio.open_nursery() as nursery:
            have_failed = trio.Event()
            nursery.start_soon(try_all, direct, self._config.dial_stagger_s, have_failed)
            if circuits:
                with trio.move_on_after(CIRCUITS_AFTER_S):
                    await have_failed.wait()
                nursery.start_soon(try_all, circuits, CIRCUIT_STAGGER_S, trio.Event())
        for surplus in connected[1:]:
            self._nursery.start_soon(surplus.close)
        return connected[0] if connected else None

    async def _dial_one(self, peer_id: PeerId, address: TcpAddress | CircuitAddress) -> Connection:
        pipe: Pipe
        if isinstance(address, TcpAddress):
            pipe = TcpPipe(await self._local_port.dial(address))
        else:
            pipe = await self._call_through_relay(address, peer_id)
        return await self._upgrader.dialled(pipe, peer_id)

    async def open_lane(self, address: TcpAddress, relay_id: PeerId, ticket: bytes) -> LanePipe:
        """A TCP connection of its own to the relay, over which nothing but a circuit goes. Raises `ConnectionLost`."""
        pipe = LanePipe(await _open_tcp(address, relay_id), relay_id)
        await self._upgrader.open_lane(pipe, relay_id, ticket)
        return pipe

    async def dial_fresh(self, address: TcpAddress, peer_id: PeerId) -> None:
        """Opens a TCP connection, lets the peer prove who it is, and closes. Raises `ConnectionLost`.

        It comes from a port that nothing else comes from: no router of the peer's has been opened for that.
        """
        await self._upgrader.authenticate(TcpPipe(await _open_tcp(address, peer_id)), peer_id)


async def _open_tcp(address: TcpAddress, peer_id: PeerId) -> trio.SocketStream:
    """From any port. Raises `ConnectionLost`."""
    try:
        return await trio.open_tcp_stream(address.host, address.port)
    except OSError as error:
        raise ConnectionLost(f"{address} does not answer: {error}", peer_id) from error
