"""Who a node is: an ed25519 key pair, its file, its peer id and its signatures.

A peer id is the base58 of an identity multihash over libp2p's protobuf of the public key, so the key can be read back
out of it and a signature checked with nothing but the id. Light: neither libp2p nor the network is imported here.
"""

import contextlib
import secrets
from functools import lru_cache
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from p2pswarm.core.errors import ConfigError, ProtocolViolation
from p2pswarm.core.ids import PeerId
from p2pswarm.net.whole_files import create_secret_file, read_secret_file

KEY_BYTES = 32
FILE_PREFIX = bytes.fromhex("08011240")
"""libp2p's protobuf of a private key: field 1 (type) = 1 (ed25519), field 2 = 64 bytes, the seed and the public key."""
PUBLIC_PREFIX = bytes.fromhex("002408011220")
"""Identity multihash (code 0, 36 bytes) of the protobuf of a public key: type = 1 (ed25519), then 32 bytes."""
BASE58_ALPHABET = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
BASE58_DIGITS = {letter: value for value, letter in enumerate(BASE58_ALPHABET)}
MAX_PEER_ID_LETTERS = 64
"""An ed25519 peer id has 52; the bound keeps the arithmetic below small whatever a stranger sends."""


class Identity:
    """A node's private key. Never printed; `private_bytes` is for the file and for the noise handshake."""

    def __init__(self, private_bytes: bytes) -> None:
        if len(private_bytes) != KEY_BYTES:
            raise ConfigError(f"an ed25519 private key has {KEY_BYTES} bytes, got {len(private_bytes)}")
        self.private_bytes = private_bytes
        self._key = Ed25519PrivateKey.from_private_bytes(private_bytes)
        self.public_bytes = self._key.public_key().public_bytes_raw()
        self.peer_id = peer_id_of(self.public_bytes)

    @classmethod
    def generate(cls, seed: bytes | None = None) -> "Identity":
        """A new identity; with a `seed` of 32 bytes always the same one (tests, simulations)."""
        return cls(secrets.token_bytes(KEY_BYTES) if seed is None else seed)

    @classmethod
    def load_or_create(cls, path: Path) -> "Identity":
        """The identity in the file, made there if there is none. Raises `ConfigError` where it cannot be trusted."""
        if not path.exists():
            with contextlib.suppress(FileExistsError):  # whoever comes second takes the first one's
                cls.generate().save(path)
        return cls.load(path)

    @classmethod
    def load(cls, path: Path) -> "Identity":
        """The identity in the file, which must be there. Raises `ConfigError` where it cannot be trusted."""
        data = read_secret_file(path, "identity")
        if len(data) != len(FILE_PREFIX) + 2 * KEY_BYTES or not data.startswith(FILE_PREFIX):
            raise ConfigError(f"{path} is not an identity file: wanted an ed25519 key of 68 bytes, got {len(data)}")
        identity = cls(data[len(FILE_PREFIX) : -KEY_BYTES])
        if identity.public_bytes != data[-KEY_BYTES:]:
            raise ConfigError(f"the identity file {path} is damaged: its two halves do not belong together")
        return identity

    def save(self, path: Path) -> None:
        """Writes a new identity file. Raises `FileExistsError` where there is one already, `ConfigError`."""
        create_secret_file(path, FILE_PREFIX + self.private_bytes + self.public_bytes, "identity")

    def sign(self, data: bytes) -> bytes:
        """64 bytes that `verify_signature` accepts for this `peer_id` and this `data` only."""
        return self._key.sign(data)

    def __repr__(self) -> str:
        return f"Identity({self.peer_id})"


def peer_id_of(public_bytes: bytes) -> PeerId:
    """The peer id of an ed25519 public key of 32 bytes."""
    return PeerId(base58_encode(PUBLIC_PREFIX + public_bytes))


@lru_cache(maxsize=4096)
def public_key_of(peer_id: PeerId) -> Ed25519PublicKey:
    """The public key inside a peer id. Raises `ProtocolViolation` for what is not an ed25519 peer id."""
    multihash = base58_decode(peer_id)
    if multihash is None or len(multihash) != len(PUBLIC_PREFIX) + KEY_BYTES or not multihash.startswith(PUBLIC_PREFIX):
        raise ProtocolViolation(f"wanted the peer id of an ed25519 key (12D3KooW...), got {peer_id[:80]!r}")
    return Ed25519PublicKey.from_public_bytes(multihash[len(PUBLIC_PREFIX) :])


def is_peer_id(text: str) -> bool:
    """Whether `text` is the peer id of an ed25519 key."""
    try:
        public_key_of(PeerId(text))
    except ProtocolViolation:
        return False
    return True


def verify_signature(peer_id: PeerId, data: bytes, signature: bytes) -> bool:
    """Whether the owner of `peer_id` signed `data`; False too for a malformed peer id or signature."""
    try:
        public_key_of(peer_id).verify(signature, data)
    except (InvalidSignature, ProtocolViolation):
        return False
    return True


def base58_encode(data: bytes) -> str:
    """Bitcoin's base58: no 0, O, I, l; a leading zero byte becomes a `1`."""
    number = int.from_bytes(data, "big")
    letters = []
    while number:
        number, digit = divmod(number, 58)
        letters.append(BASE58_ALPHABET[digit])
    num_zeros = len(data) - len(data.lstrip(b"\0"))
    return "1" * num_zeros + "".join(reversed(letters))


def base58_decode(text: str) -> bytes | None:
    """The bytes behind `text`; None where it is not base58, or longer than any peer id."""
    if len(text) > MAX_PEER_ID_LETTERS:
        return None
    number = 0
    for letter in text:
        digit = BASE58_DIGITS.get(letter)
        if digit is None:
            return None
        number = number * 58 + digit
    num_zeros = len(text) - len(text.lstrip("1"))
    return b"\0" * num_zeros + number.to_bytes((number.bit_length() + 7) // 8, "big")
