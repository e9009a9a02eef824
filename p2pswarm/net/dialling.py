"""From a peer's addresses to a connection with it.

The addresses are tried one after the other with a short head start each, and the first that answers wins. Who shares a
dial, and when one is needed, is the host's affair.
"""

from collections.abc import Callable

import trio

from p2pswarm.core.errors import ConnectionLost, NetworkError, PeerUnreachable
from p2pswarm.core.ids import PeerId
from p2pswarm.net.address_book import AddressBook
from p2pswarm.net.addresses import TcpAddress, parse_tcp_address
from p2pswarm.net.config import NetworkConfig
from p2pswarm.net.connection import Connection
from p2pswarm.net.pipe import TcpPipe
from p2pswarm.net.upgrade import Upgrader


class Dialler:
    """Dials for one node; `adopt` is given each connection at once, `nursery` closes those that came too late."""

    def __init__(
        self,
        upgrader: Upgrader,
        book: AddressBook,
        adopt: Callable[[Connection], None],
        config: NetworkConfig,
        nursery: trio.Nursery,
    ) -> None:
        self._upgrader = upgrader
        self._book = book
        self._adopt = adopt
        self._config = config
        self._nursery = nursery

    async def dial(self, peer_id: PeerId) -> Connection:
        """A new connection, adopted already. Raises `PeerUnreachable` with the reason at each address."""
        transports = self._book.get(peer_id)
        if not transports:
            raise PeerUnreachable(f"no address of {peer_id} is known", peer_id)
        failures: list[str] = []
        with trio.move_on_after(self._config.dial_timeout_s):
            connection = await self._dial_any(peer_id, transports, failures)
            if connection is not None:
                return connection
        reasons = "; ".join(failures) or f"no answer within {self._config.dial_timeout_s} s"
        raise PeerUnreachable(f"{peer_id} cannot be reached at {', '.join(transports)}: {reasons}", peer_id)

    async def _dial_any(self, peer_id: PeerId, transports: list[str], failures: list[str]) -> Connection | None:
        """The first connection that comes about; each address gets a head start over the next, or until it fails."""
        connected: list[Connection] = []

        async def try_one(transport: str, has_failed: trio.Event) -> None:
            try:
                connection = await self._dial_one(peer_id, parse_tcp_address(transport))
                connected.append(connection)
                self._book.prove(peer_id, transport)
                self._adopt(connection)  # now, since what comes next may be cancelled
                nursery.cancel_scope.cancel()
            except (OSError, NetworkError) as error:
                failures.append(f"{transport}: {error}")
            finally:
                has_failed.set()

        async with trio.open_nursery() as nursery:
            for transport in transports:
                has_failed = trio.Event()
                nursery.start_soon(try_one, transport, has_failed)
                with trio.move_on_after(self._config.dial_stagger_s):
                    await has_failed.wait()
        for surplus in connected[1:]:
            self._nursery.start_soon(surplus.close)
        return connected[0] if connected else None

    async def _dial_one(self, peer_id: PeerId, address: TcpAddress) -> Connection:
        stream = await trio.open_tcp_stream(address.host, address.port)
        return await self._upgrader.upgrade(TcpPipe(stream), peer_id)

    async def dial_fresh(self, address: TcpAddress, peer_id: PeerId) -> None:
        """Opens a TCP connection, lets the peer prove who it is, and closes. Raises `ConnectionLost`."""
        try:
            stream = await trio.open_tcp_stream(address.host, address.port)
        except OSError as error:
            raise ConnectionLost(f"{address} does not answer: {error}", peer_id) from error
        await self._upgrader.authenticate(TcpPipe(stream), peer_id)
