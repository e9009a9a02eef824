"""Only what is needed of libp2p is imported, and the rest of the program can still have all of it."""

import subprocess
import sys

PROGRAM = """
import sys
import p2pswarm.net.host
assert "libp2p.abc" in sys.modules
unwanted = {"libp2p", "libp2p.host.basic_host", "httpx", "requests", "zeroconf", "aioquic"} & sys.modules.keys()
assert not unwanted, unwanted
from libp2p import new_host
from libp2p.transport import TransportManager
from libp2p.transport.quic.stream import QUICStream
assert hasattr(QUICStream, "read")
from libp2p.peer.id import ID
assert ID is p2pswarm.net.upgrade.ID
"""


def test_the_rest_of_libp2p_is_imported_only_by_who_wants_it() -> None:
    subprocess.run([sys.executable, "-c", PROGRAM], check=True)
