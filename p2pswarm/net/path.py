"""How a connection gets to its peer: straight over TCP, or through a relay that passes its bytes on."""

from dataclasses import dataclass

from p2pswarm.core.ids import PeerId
from p2pswarm.net.addresses import TcpAddress


@dataclass(frozen=True, slots=True)
class ConnectionPath:
    """One way to a peer. `relay`: who passes the bytes on; `remote`: the far end of our own socket to the peer."""

    relay: PeerId | None = None
    remote: TcpAddress | None = None
    """As this machine sees it, so behind the NAT of a peer its NAT's address; None through a relay."""
    left_relay: PeerId | None = None
    """Who passed the bytes on before the connection became direct."""

    @property
    def is_direct(self) -> bool:
        return self.relay is None

    def __str__(self) -> str:
        return "direct" if self.relay is None else f"through relay {self.relay}"


DIRECT = ConnectionPath()
