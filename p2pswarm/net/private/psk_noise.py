"""The handshake of a private swarm: `/p2pswarm/noise-psk/1`, which goes nowhere without the swarm's key.

Theory of operation. It is Noise_XXpsk0_25519_ChaChaPoly_SHA256: the handshake of `/noise` with the swarm's secret mixed
in before the first message, so that this message can be made, and read, only by those who have the key. `I` dials:

    I   ephemeral key; nothing else, but authenticated with the secret, which proves that `I` has it
    R   ephemeral key, static key, payload; or, where it cannot read the first message, one of length 0, and closes
    I   static key, payload
    -   both know each other's version of the member list now; who has the newer one sends it: its length, its text

A payload is the node's public key (32 bytes), its signature (64) of "p2pswarm private static key 1\\0" and its static
key, and the version of its member list (8 bytes, big endian; 0 for none). Each message, and each of those that follow,
is preceded by its length in 2 bytes, as in `/noise`.

A stranger sees that this protocol is spoken here, and nothing more: no peer id, no list. At the end each side looks
whether both are members, by the same list, so that one who was removed hears of it from the first node that it meets.
"""

import struct
from dataclasses import dataclass

from cryptography.exceptions import InvalidTag
from noise.connection import Keypair, NoiseConnection
from noise.exceptions import NoiseValueError

from p2pswarm.core.errors import ConnectionLost, ProtocolViolation
from p2pswarm.core.ids import PeerId
from p2pswarm.net.identity import Identity, peer_id_of, verify_signature
from p2pswarm.net.libp2p_parts import (
    ID,
    Ed25519PublicKey,
    IRawConnection,
    ISecureConn,
    ISecureTransport,
    NoiseHandshakeReadWriter,
    NoiseTransportReadWriter,
    SecureSession,
    TProtocol,
    create_new_key_pair,
    create_new_noise_key_pair,
)
from p2pswarm.net.noise_session import NoiseSession
from p2pswarm.net.private.member_list import MAX_LIST_BYTES, MemberList
from p2pswarm.net.private.members import NO_VERSION, Members
from p2pswarm.net.private.swarm_key import SwarmKey
from p2pswarm.net.traffic import Traffic

PSK_NOISE_PROTOCOL = TProtocol("/p2pswarm/noise-psk/1")
PATTERN = b"Noise_XXpsk0_25519_ChaChaPoly_SHA256"
STATIC_KEY_DOMAIN = b"p2pswarm private static key 1\0"
PAYLOAD = struct.Struct("!32s64sQ")
LIST_LENGTH = struct.Struct("!I")
OTHER_KEY = "it has another swarm key"


@dataclass(frozen=True, slots=True)
class Introduction:
    """What the other side's payload says, once it was checked."""

    public_key: bytes
    list_version: int

    @property
    def peer_id(self) -> PeerId:
        return peer_id_of(self.public_key)


class Handshake:
    """One run of it: the messages, and what the two sides have said."""

    def __init__(self, conn: IRawConnection, noise: NoiseConnection, newest: MemberList | None) -> None:
        noise.start_handshake()
        self.stated = newest
        """The list of which the other side is told: a newer one may come meanwhile."""
        self._noise = noise
        self._state = noise.noise_protocol.handshake_state
        self._conn = conn
        self._messages = NoiseHandshakeReadWriter(conn, noise)

    @property
    def stated_version(self) -> int:
        return NO_VERSION if self.stated is None else self.stated.version

    async def read_with_key(self) -> bytes:
        """The first message of the other side. Raises `ConnectionLost` where it has another key."""
        try:
            return await self._messages.read_msg()
        except (InvalidTag, NoiseValueError):
            raise ConnectionLost(OTHER_KEY) from None

    async def read(self) -> bytes:
        return await self._messages.read_msg()

    async def write(self, payload: bytes) -> None:
        await self._messages.write_msg(payload)

    async def refuse(self) -> None:
        await self._messages.read_writer.write_msg(b"")

    def check(self, payload: bytes) -> Introduction:
        """What the other side says of itself, proven. Raises `ProtocolViolation`."""
        if len(payload) != PAYLOAD.size:
            raise ProtocolViolation(f"a handshake carries {PAYLOAD.size} bytes, got {len(payload)}")
        public_key, signature, list_version = PAYLOAD.unpack(payload)
        introduction = Introduction(public_key, list_version)
        if not verify_signature(introduction.peer_id, STATIC_KEY_DOMAIN + self._state.rs.public_bytes, signature):
            raise ProtocolViolation(f"the handshake of {introduction.peer_id} carries a false signature")
        return introduction

    def transport_messages(self) -> NoiseTransportReadWriter:
        return NoiseTransportReadWriter(self._conn, self._noise)


class PskNoiseTransport(ISecureTransport):
    """Connections between members of one private swarm; to libp2p a secure transport like any other."""

    def __init__(self, identity: Identity, key: SwarmKey, members: Members, traffic: Traffic) -> None:
        self._identity = identity
        self._key = key
        self._members = members
        self._traffic = traffic
        self._static_key = create_new_noise_key_pair()
        self._signature = identity.sign(STATIC_KEY_DOMAIN + self._static_key.public_key.to_bytes())

    async def secure_inbound(self, conn: IRawConnection) -> ISecureConn:
        noise = self._new_noise()
        noise.set_as_responder()
        handshake = Handshake(conn, noise, self._members.newest)
        try:
            await handshake.read_with_key()
        except ConnectionLost:
            await handshake.refuse()
            raise
        await handshake.write(self._payload(handshake))
        introduction = handshake.check(await handshake.read())
        return await self._enter(handshake, introduction, is_initiator=False)

    async def secure_outbound(self, conn: IRawConnection, peer_id: ID) -> ISecureConn:
        noise = self._new_noise()
        noise.set_as_initiator()
        handshake = Handshake(conn, noise, self._members.newest)
        await handshake.write(b"")
        introduction = handshake.check(await handshake.read_with_key())
        if introduction.peer_id != peer_id.to_base58():
            raise ConnectionLost(f"{introduction.peer_id} is there, not {peer_id}")
        await handshake.write(self._payload(handshake))
        return await self._enter(handshake, introduction, is_initiator=True)

    def _new_noise(self) -> NoiseConnection:
        noise = NoiseConnection.from_name(PATTERN)
        noise.set_psks(self._key.handshake_secret)
        noise.set_keypair_from_private_bytes(Keypair.STATIC, self._static_key.private_key.to_bytes())
        return noise

    def _payload(self, handshake: Handshake) -> bytes:
        return PAYLOAD.pack(self._identity.public_bytes, self._signature, handshake.stated_version)

    async def _enter(self, handshake: Handshake, introduction: Introduction, *, is_initiator: bool) -> NoiseSession:
        """The session that the handshake has come to, where both are members."""
        session = NoiseSession.over(
            SecureSession(
                local_peer=ID.from_base58(self._identity.peer_id),
                local_private_key=create_new_key_pair(self._identity.private_bytes).private_key,
                remote_peer=ID.from_base58(introduction.peer_id),
                remote_permanent_pubkey=Ed25519PublicKey.from_bytes(introduction.public_key),
                is_initiator=is_initiator,
                conn=handshake.transport_messages(),
            ),
            self._traffic,
        )
        if handshake.stated is not None and handshake.stated_version > introduction.list_version:
            await session.write(LIST_LENGTH.pack(len(handshake.stated.text)) + handshake.stated.text)
        elif handshake.stated_version < introduction.list_version:
            self._members.take(await _read_list(session))
        self._members.check_own(self._identity.peer_id)
        if not self._members.has(introduction.peer_id):
            raise ConnectionLost(f"{introduction.peer_id} is not a member of the private swarm", introduction.peer_id)
        return session


async def _read_list(session: NoiseSession) -> MemberList:
    length = await session.read(LIST_LENGTH.size)
    num_bytes = LIST_LENGTH.unpack(length)[0] if len(length) == LIST_LENGTH.size else 0
    if not 0 < num_bytes <= MAX_LIST_BYTES:
        raise ProtocolViolation(f"a member list has 1 to {MAX_LIST_BYTES} bytes, {num_bytes} announced")
    return MemberList.parse(await session.read(num_bytes))


class ForeignTransport(ISecureTransport):
    """Stands for the kind of handshake that this node has no part in: where it is the other's, there is a reason."""

    def __init__(self, reason: str) -> None:
        self._reason = reason

    async def secure_inbound(self, conn: IRawConnection) -> ISecureConn:
        raise ConnectionLost(self._reason)

    async def secure_outbound(self, conn: IRawConnection, peer_id: ID) -> ISecureConn:
        raise ConnectionLost(self._reason)
