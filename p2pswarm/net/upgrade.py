"""From a bare pipe to an authenticated connection with streams: libp2p's negotiation, our noise session and muxer.

The order in which muxers are offered is the order of preference: ours, then stock yamux, so that any libp2p node can
connect. In place of a muxer, both sides may agree that a connection they have goes on over the new pipe; in place of a
handshake, that the pipe is a lane to this relay (`nat/lanes.py`). A node of a private swarm speaks the handshake of
`private/psk_noise.py` instead of libp2p's. All that is used of libp2p comes from `libp2p_parts.py`.
"""

import contextlib
import logging
from collections.abc import AsyncIterator
from typing import Any, cast
from weakref import WeakValueDictionary

from p2pswarm.core.errors import ConnectionLost
from p2pswarm.core.ids import PeerId
from p2pswarm.net.config import NetworkConfig
from p2pswarm.net.connection import Connection
from p2pswarm.net.identity import Identity, is_peer_id
from p2pswarm.net.libp2p_parts import (
    ID,
    NOISE_PROTOCOL,
    YAMUX_PROTOCOL,
    IRawConnection,
    ISecureConn,
    ISecureTransport,
    RawConnection,
    ReadWriteCloser,
    TProtocol,
    TransportUpgrader,
    TSecurityOptions,
    Yamux,
    create_new_key_pair,
    create_new_noise_key_pair,
)
from p2pswarm.net.move_agreement import MOVE_PROTOCOL, MoveAgreement
from p2pswarm.net.mux_connection import MUX_PROTOCOL, MuxConnection
from p2pswarm.net.nat.lanes import LANE_PROTOCOL, TICKET_BYTES, ExpectedLanes, LanePipe
from p2pswarm.net.negotiation import propose, read_exactly
from p2pswarm.net.network import Buffer
from p2pswarm.net.noise_session import READ_BYTES, NoiseSession, NoiseTransport
from p2pswarm.net.pipe import Pipe
from p2pswarm.net.private.private_swarm import PrivateSwarm
from p2pswarm.net.private.psk_noise import PSK_NOISE_PROTOCOL, ForeignTransport, PskNoiseTransport
from p2pswarm.net.stock_connection import StockConnection
from p2pswarm.net.traffic import Traffic
from p2pswarm.net.unread import UnreadBytes

logging.getLogger("libp2p").setLevel(logging.CRITICAL)
"""What goes wrong with a peer is told by our exceptions; libp2p logs it again, tracebacks included."""


STRANGER = PeerId("a stranger")
"""In what goes wrong with somebody who has not said who it is."""


class Upgrader:
    """Makes connections for one node."""

    def __init__(self, identity: Identity, config: NetworkConfig, private: PrivateSwarm | None = None) -> None:
        self.traffic = Traffic()
        """Of all connections that were made here."""
        self.expected_lanes = ExpectedLanes()
        self._unread = UnreadBytes(config.max_receive_bytes)
        self._config = config
        spoken, not_spoken = _handshakes(identity, private, self.traffic)
        muxers: Any = {TProtocol(MUX_PROTOCOL): self._new_mux_connection, TProtocol(YAMUX_PROTOCOL): Yamux}
        moving: Any = {TProtocol(MOVE_PROTOCOL): MoveAgreement}
        lanes: Any = {TProtocol(LANE_PROTOCOL): LaneTransport()}
        self._accepting = TransportUpgrader({**spoken, **lanes}, muxers | moving)
        self._dialling = TransportUpgrader({**spoken, **not_spoken}, muxers)
        self._moving = TransportUpgrader(spoken, moving)
        self._movable: WeakValueDictionary[bytes, MuxConnection] = WeakValueDictionary()
        """By the hash of the handshake that each began with."""

    def _new_mux_connection(self, secured: ISecureConn, peer_id: ID) -> MuxConnection:
        assert isinstance(secured, NoiseSession)
        connection = MuxConnection(
            secured,
            PeerId(peer_id.to_base58()),
            secured.path,
            is_initiator=secured.is_initiator,
            config=self._config,
            handshake_hash=secured.handshake_hash,
            unread=self._unread,
        )
        self._movable[secured.handshake_hash] = connection
        return connection

    async def dialled(self, pipe: Pipe, peer_id: PeerId) -> Connection:
        """The connection over `pipe`, which was opened to reach `peer_id`.

        Closes the pipe when it fails, with `ConnectionLost`, or is cancelled. Set a deadline: the peer may never
        answer.
        """
        async with _closed_on_failure(pipe, peer_id):
            secured = await self._secure(pipe, peer_id)
            return _connection(await self._dialling.upgrade_connection(secured, secured.get_remote_peer()), pipe)

    async def accepted(self, pipe: Pipe) -> Connection | None:
        """The connection over `pipe`, from whoever it turns out to be.

        None where the pipe is not for a new one: an open connection goes on over it, or it is a lane. Closes the pipe
        and wants a deadline, like `dialled`.
        """
        async with _closed_on_failure(pipe, None):
            chosen: object = await self._accepting.upgrade_security(_raw(pipe, is_initiator=False), False)
            if isinstance(chosen, BareConnection):
                ticket = await read_exactly(_PipeStream(pipe, STRANGER), TICKET_BYTES)
                self.expected_lanes.take(pipe, ticket)
                return None
            secured = _authenticated(chosen)
            agreed: object = await self._accepting.upgrade_connection(secured, secured.get_remote_peer())
            if isinstance(agreed, MoveAgreement):
                await agreed.follow(self._movable.get(await agreed.read_name()))
                return None
            return _connection(agreed, pipe)

    async def move(self, connection: MuxConnection, pipe: Pipe) -> None:
        """Has `connection` go on over `pipe`, which was opened to reach its peer; to the peer it is no newcomer.

        Closes the pipe and wants a deadline, like `dialled`.
        """
        async with _closed_on_failure(pipe, connection.peer_id):
            secured = await self._secure(pipe, connection.peer_id)
            agreed: object = await self._moving.upgrade_connection(secured, secured.get_remote_peer())
            assert isinstance(agreed, MoveAgreement), "nothing else was proposed"
            await agreed.lead(connection)

    async def open_lane(self, pipe: LanePipe, relay_id: PeerId, ticket: bytes) -> None:
        """Makes of `pipe`, which was opened to reach the relay, the lane that it expects.

        Closes the pipe and wants a deadline, like `dialled`.
        """
        async with _closed_on_failure(pipe, relay_id):
            await propose(_PipeStream(pipe, relay_id), LANE_PROTOCOL)
            await pipe.send_all(ticket)

    async def authenticate(self, pipe: Pipe, peer_id: PeerId) -> None:
        """Lets the peer that was dialled prove that it is `peer_id`, and closes the pipe. Raises `ConnectionLost`."""
        async with _closed_on_failure(pipe, peer_id):
            await self._secure(pipe, peer_id)
        await pipe.aclose()

    async def _secure(self, pipe: Pipe, peer_id: PeerId) -> ISecureConn:
        expected = ID.from_base58(peer_id)
        return _authenticated(await self._dialling.upgrade_security(_raw(pipe, is_initiator=True), True, expected))


def _handshakes(
    identity: Identity, private: PrivateSwarm | None, traffic: Traffic
) -> tuple[TSecurityOptions, TSecurityOptions]:
    """The handshake that this node speaks, and the other one, which it proposes only to learn whether to tell why."""
    if private is None:
        noise = NoiseTransport(
            create_new_key_pair(identity.private_bytes), create_new_noise_key_pair().private_key, traffic
        )
        foreign = ForeignTransport("it belongs to a private swarm, whose key is needed (--swarm-key)")
        return {NOISE_PROTOCOL: noise}, {PSK_NOISE_PROTOCOL: foreign}
    psk_noise = PskNoiseTransport(identity, private.key, private.members, traffic)
    foreign = ForeignTransport("it has no swarm key, this node has one: it is not in the private swarm")
    return {PSK_NOISE_PROTOCOL: psk_noise}, {NOISE_PROTOCOL: foreign}


def _connection(agreed: object, pipe: Pipe) -> Connection:
    """Ours or Yamux, as agreed; to libp2p's types both are the latter."""
    if isinstance(agreed, MuxConnection):
        return agreed
    assert isinstance(agreed, Yamux), "nothing else is spoken here"
    return StockConnection(agreed, PeerId(agreed.peer_id.to_base58()), pipe.path)


def _raw(pipe: Pipe, *, is_initiator: bool) -> RawConnection:
    return RawConnection(PipeForLibp2p(pipe), initiator=is_initiator)


def _authenticated(secured: object) -> ISecureConn:
    assert isinstance(secured, ISecureConn), "what a handshake comes to"
    peer_id = secured.get_remote_peer()
    if not is_peer_id(peer_id.to_base58()):
        raise ConnectionLost(f"the peer has no ed25519 key: {peer_id}")
    return secured


class BareConnection:
    """Stands for what others have after a handshake: the other side has chosen a lane."""


class LaneTransport(ISecureTransport):
    """The choice of a lane in place of a handshake, as libp2p wants it."""

    async def secure_inbound(self, conn: IRawConnection) -> ISecureConn:
        return cast("ISecureConn", BareConnection())

    async def secure_outbound(self, conn: IRawConnection, peer_id: ID) -> ISecureConn:
        raise NotImplementedError("a lane is asked for by `Upgrader.open_lane`")


class _PipeStream:
    """A pipe as negotiation wants it."""

    def __init__(self, pipe: Pipe, peer_id: PeerId) -> None:
        self.peer_id = peer_id
        self._pipe = pipe

    async def read(self, max_bytes: int = READ_BYTES) -> bytes:
        return await self._pipe.receive_some(max_bytes)

    async def write(self, *buffers: Buffer) -> None:
        await self._pipe.send_all(b"".join(buffers))


class PipeForLibp2p(ReadWriteCloser):
    """A pipe as libp2p wants it; what it raises is ours, and libp2p lets it through."""

    def __init__(self, pipe: Pipe) -> None:
        self.pipe = pipe

    async def read(self, n: int | None = None) -> bytes:
        return await self.pipe.receive_some(READ_BYTES if n is None else n) if n != 0 else b""

    async def write(self, data: bytes) -> None:
        await self.pipe.send_all(data)

    async def close(self) -> None:
        await self.pipe.aclose()

    def get_remote_address(self) -> tuple[str, int] | None:
        remote = self.pipe.path.remote
        return None if remote is None else (remote.host, remote.port)


@contextlib.asynccontextmanager
async def _closed_on_failure(pipe: Pipe, peer_id: PeerId | None) -> AsyncIterator[None]:
    try:
        yield
    except BaseException as error:
        await pipe.aclose()
        if not isinstance(error, Exception):
            raise
        # A border: a stranger's bytes can fail in any layer of libp2p, each with exceptions of its own.
        raise ConnectionLost(f"no agreement with {peer_id or 'the peer'}: {_reason(error)}", peer_id) from error


def _reason(error: BaseException) -> str:
    """The innermost cause that says anything."""
    reasons = []
    current: BaseException | None = error
    while current is not None:
        reasons.append(str(current) or type(current).__name__)
        current = current.__cause__
    return reasons[-1]
