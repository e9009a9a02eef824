"""The key of a private swarm: what its members share, and who decides who is one.

The file is a few lines of TOML, open to nobody but its user:

    version = 1
    key = "0M6xj8Jm..."             32 random bytes, base64url
    owner = "12D3KooW..."           the peer id whose signature member lists carry

Who has the file is in, unless the owner keeps a list of members (`net/private/member_list.py`). The owner's own key
is a file of its own, which no node needs. What the key does to a handshake is in `net/private/psk_noise.py`.
"""

import base64
import binascii
import hashlib
import secrets
import tomllib
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from p2pswarm.core.errors import ConfigError
from p2pswarm.core.ids import PeerId
from p2pswarm.net.identity import Identity, is_peer_id
from p2pswarm.net.whole_files import create_secret_file, read_secret_file

SECRET_BYTES = 32
FILE_VERSION = 1
FILE_KEYS = {"version", "key", "owner"}
HANDSHAKE_DOMAIN = b"p2pswarm handshake of a private swarm 1\0"
SWARM_ID_DOMAIN = b"p2pswarm id of a private swarm 1\0"
SWARM_ID_BYTES = 8
"""Enough to tell one person's swarms apart; it authenticates nothing."""

FILE_TEXT = """\
# The key of a private swarm. Whoever has it can join: hand it to members only (`swarm invite` does).
version = {version}
key = "{key}"
owner = "{owner}"
"""


@dataclass(frozen=True)
class SwarmKey:
    """Two nodes with equal ones can connect."""

    secret: bytes = field(repr=False)
    owner: PeerId

    def __post_init__(self) -> None:
        if len(self.secret) != SECRET_BYTES:
            raise ConfigError(f"a swarm key has {SECRET_BYTES} secret bytes, got {len(self.secret)}")
        if not is_peer_id(self.owner):
            raise ConfigError(f"the owner of a swarm key is a peer id (12D3KooW...), got {self.owner[:80]!r}")

    @classmethod
    def generate(cls, owner: Identity) -> "SwarmKey":
        """A new one, whose members `owner` decides on."""
        return cls(secrets.token_bytes(SECRET_BYTES), owner.peer_id)

    @classmethod
    def load(cls, path: Path) -> "SwarmKey":
        """The key in the file. Raises `ConfigError` where it is missing, damaged, or open to other users."""
        data = read_secret_file(path, "swarm key")
        try:
            values = tomllib.loads(data.decode())
            if set(values) != FILE_KEYS or values["version"] != FILE_VERSION:
                raise ValueError("other keys or another version")
            secret, owner = base64.urlsafe_b64decode(values["key"]), PeerId(str(values["owner"]))
        except (ValueError, TypeError, binascii.Error) as error:  # that is all that tomllib and base64 raise
            raise ConfigError(
                f"{path} is not a swarm key file of version {FILE_VERSION} (`swarm keygen` makes one)"
            ) from error
        return cls(secret, owner)

    def save(self, path: Path) -> None:
        """Writes a new file. Raises `ConfigError` where there is one already: a key is not to be lost."""
        key = base64.urlsafe_b64encode(self.secret).decode()
        text = FILE_TEXT.format(version=FILE_VERSION, key=key, owner=self.owner)
        try:
            create_secret_file(path, text.encode(), "swarm key")
        except FileExistsError as error:
            raise ConfigError(f"{path} is there already: choose another name, or remove it first") from error

    @cached_property
    def handshake_secret(self) -> bytes:
        """32 bytes that both ends of a connection must have; the owner is in them, so that it cannot differ."""
        return hashlib.sha256(HANDSHAKE_DOMAIN + self.secret + self.owner.encode()).digest()

    @cached_property
    def swarm_id(self) -> str:
        """A short name for the swarm, for people and file names. Tells nothing about the secret."""
        digest = hashlib.sha256(SWARM_ID_DOMAIN + self.handshake_secret).digest()
        return digest[:SWARM_ID_BYTES].hex()
