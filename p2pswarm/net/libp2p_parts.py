"""The parts of libp2p that are used here, without the rest. Nothing else of the house imports libp2p.

`import libp2p` runs all of it: QUIC, mDNS, ACME, two HTTP clients and a DNS resolver, 0.65 s of CPU time and 640
modules too many; what is needed takes 0.2 s. While this file is imported, bare packages stand for `libp2p` and those
between it and what is needed, so that only the files that are asked for run, and an empty class for the QUIC stream
that `libp2p.custom_types` names in a type alias. Afterwards all of them are as if nothing had happened: who imports
libp2p elsewhere in the program gets it whole.
"""

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

__all__ = [
    "ID",
    "NOISE_PROTOCOL",
    "YAMUX_PROTOCOL",
    "DecodeError",
    "Ed25519PublicKey",
    "HolePunch",
    "HopMessage",
    "IMuxedConn",
    "IMuxedStream",
    "IOException",
    "IRawConnection",
    "ISecureConn",
    "ISecureTransport",
    "Multiaddr",
    "MuxedConnError",
    "MuxedStreamEOF",
    "MuxedStreamError",
    "NoiseHandshakeReadWriter",
    "NoiseTransportReadWriter",
    "RawConnection",
    "ReadWriteCloser",
    "SecureSession",
    "StopMessage",
    "TProtocol",
    "TSecurityOptions",
    "Transport",
    "TransportUpgrader",
    "Yamux",
    "create_new_key_pair",
    "create_new_noise_key_pair",
]


QUIC_STREAM = "libp2p.transport.quic.stream"


@contextmanager
def _bare_packages(*names: str) -> Iterator[None]:
    """Has packages whose `__init__` does not run; those that have run already stay."""
    found = importlib.util.find_spec("libp2p")
    bare = {}
    if found is not None and found.origin is not None and "libp2p" not in sys.modules:
        for name in names:
            bare[name] = ModuleType(name)
            bare[name].__path__ = [str(Path(found.origin).parent.joinpath(*name.split(".")[1:]))]
        bare[QUIC_STREAM] = ModuleType(QUIC_STREAM)
        vars(bare[QUIC_STREAM])["QUICStream"] = type("QUICStream", (), {})
    sys.modules |= bare
    try:
        yield
    finally:
        for name in bare:
            del sys.modules[name]


RELAY_PACKAGES = ("libp2p.relay", "libp2p.relay.circuit_v2")

with _bare_packages("libp2p", "libp2p.transport", *RELAY_PACKAGES):
    from google.protobuf.message import DecodeError
    from libp2p.abc import IMuxedConn, IMuxedStream, IRawConnection, ISecureConn, ISecureTransport
    from libp2p.crypto.ed25519 import Ed25519PublicKey, create_new_key_pair
    from libp2p.crypto.x25519 import create_new_key_pair as create_new_noise_key_pair
    from libp2p.custom_types import TProtocol, TSecurityOptions
    from libp2p.io.abc import ReadWriteCloser
    from libp2p.io.exceptions import IOException
    from libp2p.network.connection.raw_connection import RawConnection
    from libp2p.peer.id import ID
    from libp2p.relay.circuit_v2.pb.circuit_pb2 import HopMessage, StopMessage
    from libp2p.relay.circuit_v2.pb.dcutr_pb2 import HolePunch
    from libp2p.security.noise.io import NoiseHandshakeReadWriter, NoiseTransportReadWriter
    from libp2p.security.noise.transport import PROTOCOL_ID as NOISE_PROTOCOL
    from libp2p.security.noise.transport import Transport
    from libp2p.security.secure_session import SecureSession
    from libp2p.stream_muxer.exceptions import MuxedConnError, MuxedStreamEOF, MuxedStreamError
    from libp2p.stream_muxer.yamux.yamux import PROTOCOL_ID as YAMUX_PROTOCOL
    from libp2p.stream_muxer.yamux.yamux import Yamux
    from libp2p.transport.upgrader import TransportUpgrader
    from multiaddr import Multiaddr
