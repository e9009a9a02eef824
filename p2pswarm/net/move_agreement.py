"""Over a new transport to a peer, agreeing on which open connection goes on over it: `/p2pswarm/move/1.0.0`.

It is proposed in place of a muxer. The dialler names the connection by the hash of the handshake it began with, which
only its two ends know; the listener, where it has that connection with this peer, answers with one byte. How the
connection then moves is told in `mux_transports.py`.
"""

from p2pswarm.core.errors import ConnectionLost
from p2pswarm.core.ids import PeerId, ProtocolId
from p2pswarm.net.libp2p_parts import ID, ISecureConn
from p2pswarm.net.mux_connection import MuxConnection
from p2pswarm.net.noise_session import NoiseSession

MOVE_PROTOCOL = ProtocolId("/p2pswarm/move/1.0.0")
HASH_BYTES = 32
AGREED = b"\1"


class MoveAgreement:
    """What the muxer's negotiation ends in where the transport is for a connection that is open already."""

    def __init__(self, secured: ISecureConn, peer_id: ID) -> None:
        assert isinstance(secured, NoiseSession)
        self.peer_id = PeerId(peer_id.to_base58())
        self._session = secured

    async def lead(self, connection: MuxConnection) -> None:
        """The dialler's part: `connection` is on its way when this returns. Raises `ConnectionLost`."""
        await self._session.write(connection.handshake_hash)
        if await self._session.read(len(AGREED)) != AGREED:
            raise ConnectionLost(f"{self.peer_id} does not follow: it has no such connection", self.peer_id)
        connection.move_to(self._session, self._session.path)

    async def read_name(self) -> bytes:
        """The listener's part begins with the hash of the connection that is meant."""
        return await self._session.read(HASH_BYTES)

    async def follow(self, connection: MuxConnection | None) -> None:
        """Moves as soon as the dialler does. Raises `ConnectionLost` where there is no such connection (None)."""
        if connection is None or connection.peer_id != self.peer_id or connection.is_initiator:
            raise ConnectionLost(f"{self.peer_id} wants to move a connection that is not open", self.peer_id)
        connection.move_to(self._session, self._session.path)
        await self._session.write(AGREED)
