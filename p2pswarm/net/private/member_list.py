"""Who may be in a private swarm: peer ids, signed by its owner. Pure; how lists spread is in `member_exchange.py`.

A list is a text, the same in a file and on the wire:

    p2pswarm members 1
    owner 12D3KooW...
    version 7
    member 12D3KooW...
    member 12D3KooW...
    signature base64url of the owner's signature of all lines above

Of two lists the one with the higher version holds.
"""

import base64
import binascii
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from p2pswarm.core.errors import ConfigError, ProtocolViolation
from p2pswarm.core.ids import PeerId
from p2pswarm.net.identity import Identity, verify_signature

MAX_MEMBERS = 10_000
MAX_LIST_BYTES = 1 << 20
"""A member takes 60."""
MAX_VERSION = (1 << 63) - 1
LIST_PATTERN = re.compile(
    rb"p2pswarm members 1\nowner (\w{40,64})\nversion (\d{1,19})\n((?:member \w{40,64}\n)*)signature ([\w=-]{40,100})\n"
)
"""Letters that no peer id has are let through: they harm nobody, and the owner has signed them."""


@dataclass(frozen=True, slots=True)
class MemberList:
    """A list whose signature was checked."""

    owner: PeerId
    version: int
    members: frozenset[PeerId]
    text: bytes = field(repr=False)

    @classmethod
    def sign(cls, owner: Identity, version: int, members: Iterable[PeerId]) -> "MemberList":
        """A new list by the owner. Raises `ConfigError`: too many."""
        chosen = frozenset(members)
        if len(chosen) > MAX_MEMBERS:
            raise ConfigError(f"a swarm has up to {MAX_MEMBERS} listed members, got {len(chosen)}")
        lines = [f"owner {owner.peer_id}", f"version {version}", *(f"member {member}" for member in sorted(chosen))]
        text = "p2pswarm members 1\n" + "".join(f"{line}\n" for line in lines)
        signature = base64.urlsafe_b64encode(owner.sign(text.encode())).decode()
        return cls(owner.peer_id, version, chosen, f"{text}signature {signature}\n".encode())

    @classmethod
    def parse(cls, text: bytes) -> "MemberList":
        """The list in `text`. Raises `ProtocolViolation` for anything but a list with its owner's signature."""
        match = LIST_PATTERN.fullmatch(text) if len(text) <= MAX_LIST_BYTES else None
        if match is None:
            raise ProtocolViolation(f"not a member list: {text[:60]!r}, {len(text)} bytes in all")
        owner, version, members = PeerId(match[1].decode()), int(match[2]), match[3].decode().split()[1::2]
        try:
            signature = base64.urlsafe_b64decode(match[4])
        except binascii.Error:
            signature = b""
        if not verify_signature(owner, text[: match.start(4) - len(b"signature ")], signature):
            raise ProtocolViolation(f"the signature of a member list by {owner} is false")
        if len(members) > MAX_MEMBERS or version > MAX_VERSION:
            raise ProtocolViolation(f"a member list with {len(members)} members and version {version} is too large")
        return cls(owner, version, frozenset(map(PeerId, members)), text)

    @classmethod
    def load(cls, path: Path) -> "MemberList":
        """The list in the file. Raises `ConfigError` where there is none, or it is not signed as it should be."""
        try:
            with path.open("rb") as file:
                return cls.parse(file.read(MAX_LIST_BYTES + 1))
        except OSError as error:
            raise ConfigError(f"cannot read the member list {path}: {error.strerror}") from error
        except ProtocolViolation as error:
            raise ConfigError(f"{path}: {error}") from error

    def changed_by(self, owner: Identity, now_unix_s: int, members: Iterable[PeerId]) -> "MemberList":
        """The next version. Raises `ConfigError`: somebody else's list.

        Versions are times, so that an owner who has lost the list, and begins anew, is heard all the same.
        """
        if owner.peer_id != self.owner:
            raise ConfigError(f"the list belongs to {self.owner}, this is the key of {owner.peer_id}")
        return MemberList.sign(owner, max(self.version + 1, now_unix_s), members)
