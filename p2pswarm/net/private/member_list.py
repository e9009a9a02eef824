"""Who may be in a private swarm: a list signed by its owner. Pure; how lists spread is in `member_exchange.py`.

A list is a text, the same in a file and on the wire:

    p2pswarm members 1
    owner 12D3KooW...
    version 1795300000
    member 5d41402abc4b2a76b9719d911017c592
    signature base64url of the owner's signature of all lines above

A member is written as a hash of its peer id: who knows the id can tell whether it is on the list, and nobody can read
from the list who the others are; for it is shown to those who were removed, too. A file may have lines that begin with
`#` besides, where the owner keeps the ids. Of two lists the one with the higher version holds.
"""

import base64
import binascii
import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from p2pswarm.core.errors import ConfigError, ProtocolViolation
from p2pswarm.core.ids import PeerId
from p2pswarm.net.identity import Identity, verify_signature

MAX_MEMBERS = 10_000
MAX_LIST_BYTES = 1 << 19
"""A member takes 40."""
MAX_FILE_BYTES = 1 << 21
MAX_VERSION = (1 << 63) - 1
MEMBER_DOMAIN = b"p2pswarm member 1\0"
MEMBER_BYTES = 16
LIST_PATTERN = re.compile(
    rb"p2pswarm members 1\nowner (\w{40,64})\nversion (\d{1,19})\n((?:member [0-9a-f]{32}\n)*)"
    rb"signature ([\w=-]{40,100})\n"
)
COMMENT = b"#"


@dataclass(frozen=True, slots=True)
class MemberList:
    """A list whose signature was checked."""

    owner: PeerId
    version: int
    members: frozenset[str]
    """Hashes; ask `has`."""
    text: bytes = field(repr=False)

    def has(self, peer_id: PeerId) -> bool:
        return _hash(self.owner, peer_id) in self.members

    @classmethod
    def sign(cls, owner: Identity, version: int, members: Iterable[PeerId]) -> "MemberList":
        """A new list by the owner. Raises `ConfigError`: too many."""
        return cls._sign(owner, version, frozenset(_hash(owner.peer_id, member) for member in members))

    @classmethod
    def _sign(cls, owner: Identity, version: int, members: frozenset[str]) -> "MemberList":
        if len(members) > MAX_MEMBERS:
            raise ConfigError(f"a swarm has up to {MAX_MEMBERS} listed members, got {len(members)}")
        lines = [f"owner {owner.peer_id}", f"version {version}", *(f"member {member}" for member in sorted(members))]
        text = "p2pswarm members 1\n" + "".join(f"{line}\n" for line in lines)
        signature = base64.urlsafe_b64encode(owner.sign(text.encode())).decode()
        return cls(owner.peer_id, version, members, f"{text}signature {signature}\n".encode())

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
        return cls(owner, version, frozenset(members), text)

    @classmethod
    def load(cls, path: Path) -> "MemberList":
        """The list in the file. Raises `ConfigError` where there is none, or it is not signed as it should be."""
        try:
            with path.open("rb") as file:
                lines = file.read(MAX_FILE_BYTES).splitlines(keepends=True)
            return cls.parse(b"".join(line for line in lines if not line.startswith(COMMENT)))
        except OSError as error:
            raise ConfigError(f"cannot read the member list {path}: {error.strerror}") from error
        except ProtocolViolation as error:
            raise ConfigError(f"{path}: {error}") from error

    def changed_by(
        self, owner: Identity, now_unix_s: int, *, add: Iterable[PeerId] = (), remove: Iterable[PeerId] = ()
    ) -> "MemberList":
        """The next version. Raises `ConfigError`: somebody else's list.

        Versions are times, so that an owner who has lost the list, and begins anew, is heard all the same.
        """
        if owner.peer_id != self.owner:
            raise ConfigError(f"the list belongs to {self.owner}, this is the key of {owner.peer_id}")
        added, removed = ({_hash(self.owner, peer_id) for peer_id in peer_ids} for peer_ids in (add, remove))
        return MemberList._sign(owner, max(self.version + 1, now_unix_s), (self.members | added) - removed)


def _hash(owner: PeerId, peer_id: PeerId) -> str:
    return hashlib.sha256(MEMBER_DOMAIN + f"{owner} {peer_id}".encode()).digest()[:MEMBER_BYTES].hex()
