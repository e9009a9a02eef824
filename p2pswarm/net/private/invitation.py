"""One string with which somebody joins a private swarm: its key, and addresses of some nodes.

    p2pswarm:<base64url of msgpack [version, secret, owner, [multiaddr, ...]], then 4 bytes of its SHA-256>

It holds the key, so it is as secret as the key's file, and never part of an error message.
"""

import base64
import binascii
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import msgpack

from p2pswarm.core.errors import ConfigError
from p2pswarm.core.ids import PeerId
from p2pswarm.net.addresses import split_peer_address
from p2pswarm.net.private.swarm_key import SwarmKey

PREFIX = "p2pswarm:"
VERSION = 1
CHECKSUM_BYTES = 4
"""Against what copying does to a string; nobody gains by forging one."""
MAX_LETTERS = 8192


@dataclass(frozen=True, slots=True)
class Invitation:
    """Where a private swarm is, and its key."""

    key: SwarmKey
    addresses: tuple[str, ...]

    def __str__(self) -> str:
        body = msgpack.packb([VERSION, self.key.secret, self.key.owner, list(self.addresses)])
        return PREFIX + base64.urlsafe_b64encode(body + _checksum(body)).decode().rstrip("=")

    @classmethod
    def parse(cls, text: str) -> "Invitation":
        """Raises `ConfigError` for what is no invitation, or not a whole one."""
        encoded = text.strip().removeprefix(PREFIX)
        try:
            if len(encoded) > MAX_LETTERS:
                raise ValueError("too long")
            data = base64.urlsafe_b64decode(encoded + "=" * (-len(encoded) % 4))
            body, checksum = data[:-CHECKSUM_BYTES], data[-CHECKSUM_BYTES:]
            if checksum != _checksum(body):
                raise ValueError("wrong checksum")
            version, *fields = msgpack.unpackb(body)
        except (ValueError, TypeError, binascii.Error) as error:  # msgpack's own errors are ValueErrors
            raise ConfigError("this invitation is damaged: copy it as a whole, from p2pswarm: to its end") from error
        if version != VERSION:
            raise ConfigError(f"this invitation is of version {version!r}, wanted {VERSION}: one of the two is too old")
        return cls._of(fields)

    @classmethod
    def _of(cls, fields: list[object]) -> "Invitation":
        match fields:
            case [bytes(secret), str(owner), list(addresses)]:
                invitation = cls(SwarmKey(secret, PeerId(owner)), tuple(map(str, addresses)))
                for address in invitation.addresses:
                    split_peer_address(address)
                return invitation
        raise ConfigError("this invitation does not hold a key, its owner and addresses: ask for another one")


def _checksum(body: bytes) -> bytes:
    return hashlib.sha256(body).digest()[:CHECKSUM_BYTES]


def accept_invitations(peers: Sequence[str], key: SwarmKey | None) -> tuple[tuple[str, ...], SwarmKey | None]:
    """The addresses in `peers`, invitations opened, and the key: the given one or theirs.

    Raises `ConfigError` for a damaged invitation, or one to another swarm.
    """
    addresses: list[str] = []
    for peer in peers:
        if not peer.startswith(PREFIX):
            addresses.append(peer)
            continue
        invitation = Invitation.parse(peer)
        if key is not None and invitation.key != key:
            raise ConfigError(
                f"an invitation to the swarm {invitation.key.swarm_id} came with the key of {key.swarm_id}: "
                "one node is in one swarm"
            )
        key = invitation.key
        addresses.extend(invitation.addresses)
    return tuple(addresses), key
