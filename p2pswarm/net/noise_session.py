"""libp2p's noise with a session of our own: same handshake, same bytes on the wire, a third of the time a message.

Stock noise reads a message with two socket calls and writes it with one each; here a read takes all that has arrived
and a write of any length is one send. Only two tasks use a session after the handshake, the muxer's reader and its
writer, so a cancelled caller can neither tear a message nor lose a nonce.
"""

from collections import deque
from collections.abc import Sequence
from typing import Any, cast

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from p2pswarm.core.errors import ProtocolViolation
from p2pswarm.net.libp2p_parts import ID, IRawConnection, ISecureConn, SecureSession, Transport
from p2pswarm.net.path import ConnectionPath
from p2pswarm.net.pipe import Pipe
from p2pswarm.net.traffic import Traffic

TAG_BYTES = 16
MAX_PLAINTEXT_BYTES = 65535 - TAG_BYTES
"""Of one noise message: 65,535 bytes with its tag."""
LENGTH_BYTES = 2
READ_BYTES = 256 * 1024


class NoiseTransport(Transport):
    """libp2p's noise transport, whose connections are `NoiseSession`s."""

    def __init__(self, libp2p_keys: Any, noise_key: Any, traffic: Traffic) -> None:
        super().__init__(libp2p_keys, noise_key)
        self._traffic = traffic

    async def secure_inbound(self, conn: IRawConnection) -> ISecureConn:
        return NoiseSession.over(await super().secure_inbound(conn), self._traffic)

    async def secure_outbound(self, conn: IRawConnection, peer_id: ID) -> ISecureConn:
        return NoiseSession.over(await super().secure_outbound(conn, peer_id), self._traffic)


class NoiseSession(SecureSession):
    """A `mux_transports.SecureTransport`, and to libp2p a secure connection like any other."""

    _encryption: ChaCha20Poly1305
    _decryption: ChaCha20Poly1305
    _pipe: Pipe
    _traffic: Traffic
    handshake_hash: bytes
    """Of this handshake and no other; both ends know it, and nobody else."""

    @classmethod
    def over(cls, secured: ISecureConn, traffic: Traffic) -> "NoiseSession":
        """Takes over right after the handshake, which reads exactly its own messages."""
        assert isinstance(secured, SecureSession)
        session = cls(
            local_peer=secured.local_peer,
            local_private_key=secured.local_private_key,
            remote_peer=secured.remote_peer,
            remote_permanent_pubkey=secured.remote_permanent_pubkey,
            is_initiator=secured.is_initiator,
            conn=secured.conn,
        )
        reader_writer = cast("Any", secured.conn)
        noise = reader_writer.noise_state.noise_protocol
        session.handshake_hash = noise.handshake_hash
        session._encryption = noise.cipher_state_encrypt.cipher.cipher
        session._decryption = noise.cipher_state_decrypt.cipher.cipher
        session._pipe = reader_writer.read_writer.read_write_closer.stream.pipe
        # What runs over another connection is counted there, as what goes over a socket.
        session._traffic = traffic if session._pipe.is_socket else Traffic()
        return session

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._num_encrypted = 0
        self._num_decrypted = 0
        self._unsent = b""
        self._ciphertext = b""
        self._plaintexts: deque[bytes] = deque()

    @property
    def path(self) -> ConnectionPath:
        return self._pipe.path

    async def write_all(self, buffers: Sequence[bytes | memoryview]) -> None:
        """Encrypts the buffers as one run of bytes and sends it, after what `write_now` has left."""
        data = self._encrypt(buffers)
        if self._unsent:
            data, self._unsent = self._unsent + data, b""
        await self._pipe.send_all(data)

    def write_now(self, buffers: Sequence[bytes | memoryview]) -> bool:
        """Encrypts the buffers and gives the pipe what it takes without waiting; whether that was all.

        Not while `write_all` is under way, nor when something was left before.
        """
        data = self._encrypt(buffers)
        num_sent = self._pipe.send_now(data)
        self._unsent = bytes(data[num_sent:])
        return not self._unsent

    def _encrypt(self, buffers: Sequence[bytes | memoryview]) -> bytes | bytearray:
        """Straight into what is sent: pieces that are put together afterwards take as long as encrypting them."""
        plaintext = memoryview(buffers[0] if len(buffers) == 1 else b"".join(buffers))
        num_messages = -(-len(plaintext) // MAX_PLAINTEXT_BYTES)
        data = bytearray(len(plaintext) + num_messages * (LENGTH_BYTES + TAG_BYTES))
        view = memoryview(data)
        end = 0
        for start in range(0, len(plaintext), MAX_PLAINTEXT_BYTES):
            piece = plaintext[start : start + MAX_PLAINTEXT_BYTES]
            message_start = end + LENGTH_BYTES
            data[end:message_start] = (len(piece) + TAG_BYTES).to_bytes(LENGTH_BYTES, "big")
            end = message_start + len(piece) + TAG_BYTES
            self._encryption.encrypt_into(_nonce(self._num_encrypted), piece, None, view[message_start:end])
            self._num_encrypted += 1
        self._traffic.sent_bytes += len(data)
        return data

    async def read_some(self) -> bytes:
        """A message that has arrived, at least one byte; `b""` at the end."""
        while True:
            while self._plaintexts:
                plaintext = self._plaintexts.popleft()
                if plaintext:
                    return plaintext
            arrived = await self._pipe.receive_some(READ_BYTES)
            if not arrived:
                return b""
            self._traffic.received_bytes += len(arrived)
            self._decrypt_arrived(self._ciphertext + arrived if self._ciphertext else arrived)

    def _decrypt_arrived(self, ciphertext: bytes) -> None:
        """Decrypts the whole messages and keeps the rest, less than one, for later."""
        view = memoryview(ciphertext)
        start = 0
        while len(ciphertext) - start >= LENGTH_BYTES:
            end = start + LENGTH_BYTES + (ciphertext[start] << 8 | ciphertext[start + 1])
            if len(ciphertext) < end:
                break
            self._plaintexts.append(self._decrypt(view[start + LENGTH_BYTES : end]))
            start = end
        self._ciphertext = ciphertext[start:]

    def _decrypt(self, message: memoryview) -> bytes:
        try:
            plaintext = self._decryption.decrypt(_nonce(self._num_decrypted), message, None)
        except InvalidTag as error:
            raise ProtocolViolation(f"a noise message of {len(message)} bytes does not decrypt") from error
        self._num_decrypted += 1
        return plaintext

    async def read(self, n: int | None = None) -> bytes:
        """Exactly `n` bytes, or what there is; for libp2p's negotiation of the muxer, and for stock yamux."""
        if n is None:
            return await self.read_some()
        gathered = bytearray()
        while len(gathered) < n:
            plaintext = await self.read_some()
            if not plaintext:
                break
            gathered += plaintext
        if len(gathered) > n:
            self._plaintexts.appendleft(bytes(gathered[n:]))
        return bytes(gathered[:n])

    async def write(self, data: bytes) -> None:
        await self.write_all([data])


def _nonce(counter: int) -> bytes:
    return b"\0\0\0\0" + counter.to_bytes(8, "little")
