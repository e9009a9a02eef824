"""From bare TCP to an authenticated connection with streams: libp2p's negotiation, our noise session and muxer.

The order in which muxers are offered is the order of preference: ours, then stock yamux, so that any libp2p node can
connect. All that is used of libp2p comes from `libp2p_parts.py`.
"""

import logging
from typing import Any, cast

import trio

from p2pswarm.core.errors import ConnectionLost
from p2pswarm.core.ids import PeerId
from p2pswarm.net.config import NetworkConfig
from p2pswarm.net.connection import Connection
from p2pswarm.net.identity import Identity, is_peer_id
from p2pswarm.net.libp2p_parts import (
    ID,
    NOISE_PROTOCOL,
    YAMUX_PROTOCOL,
    IMuxedConn,
    ISecureConn,
    RawConnection,
    TProtocol,
    TransportUpgrader,
    TrioTCPStream,
    Yamux,
    create_new_key_pair,
    create_new_noise_key_pair,
)
from p2pswarm.net.mux_connection import MUX_PROTOCOL, MuxConnection
from p2pswarm.net.noise_session import NoiseSession, NoiseTransport
from p2pswarm.net.stock_connection import StockConnection
from p2pswarm.net.traffic import Traffic

logging.getLogger("libp2p").setLevel(logging.CRITICAL)
"""What goes wrong with a peer is told by our exceptions; libp2p logs it again, tracebacks included."""


class Upgrader:
    """Makes connections for one node."""

    def __init__(self, identity: Identity, config: NetworkConfig) -> None:
        self.traffic = Traffic()
        """Of all connections that were made here."""
        self._config = config
        noise = NoiseTransport(
            create_new_key_pair(identity.private_bytes), create_new_noise_key_pair().private_key, self.traffic
        )
        muxers = {TProtocol(MUX_PROTOCOL): self._new_mux_connection, TProtocol(YAMUX_PROTOCOL): Yamux}
        self._upgrader = TransportUpgrader({TProtocol(NOISE_PROTOCOL): noise}, cast("Any", muxers))

    def _new_mux_connection(self, secured: ISecureConn, peer_id: ID) -> MuxConnection:
        assert isinstance(secured, NoiseSession)
        return MuxConnection(
            secured, PeerId(peer_id.to_base58()), is_initiator=secured.is_initiator, config=self._config
        )

    async def upgrade(self, stream: trio.SocketStream, peer_id: PeerId | None) -> Connection:
        """The connection over `stream`, dialled to `peer_id` or (None) accepted from whoever it turns out to be.

        Closes the stream when it fails, with `ConnectionLost`, or is cancelled. Set a deadline: the peer may never
        answer.
        """
        try:
            return await self._upgrade(stream, peer_id)
        except BaseException as error:
            await trio.aclose_forcefully(stream)
            if not isinstance(error, Exception):
                raise
            # A border: a stranger's bytes can fail in any layer of libp2p, each with exceptions of its own.
            raise ConnectionLost(f"no agreement with {peer_id or 'the peer'}: {_reason(error)}", peer_id) from error

    async def _upgrade(self, stream: trio.SocketStream, peer_id: PeerId | None) -> Connection:
        raw = RawConnection(TrioTCPStream(stream), initiator=peer_id is not None)
        expected = ID.from_base58(peer_id) if peer_id is not None else None
        secured = await self._upgrader.upgrade_security(raw, expected is not None, expected)
        authenticated = secured.get_remote_peer()
        if not is_peer_id(authenticated.to_base58()):
            raise ConnectionLost(f"the peer has no ed25519 key: {authenticated}")
        # Ours or Yamux, as agreed; to libp2p's types both are the latter.
        muxed: IMuxedConn | MuxConnection = await self._upgrader.upgrade_connection(secured, authenticated)
        if isinstance(muxed, MuxConnection):
            return muxed
        return StockConnection(muxed, PeerId(authenticated.to_base58()))


def _reason(error: BaseException) -> str:
    """The innermost cause that says anything."""
    reasons = []
    current: BaseException | None = error
    while current is not None:
        reasons.append(str(current) or type(current).__name__)
        current = current.__cause__
    return reasons[-1]
