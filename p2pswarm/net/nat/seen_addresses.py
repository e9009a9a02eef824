"""At which address relays see this node, each asked once in a while: where its router lets answers through."""

import logging
from collections import OrderedDict

import trio

from p2pswarm.core.errors import NetworkError, RemoteError
from p2pswarm.core.ids import PeerId
from p2pswarm.net.addresses import TcpAddress
from p2pswarm.net.nat.probing import ask_peer
from p2pswarm.net.network import Network

ASK_TIMEOUT_S = 2.0
"""It is one round trip over a connection that is open."""
LIFETIME_S = 60.0
MAX_RELAYS = 64

logger = logging.getLogger(__name__)


class SeenAddresses:
    """Remembers what each relay has said last."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._seen: OrderedDict[PeerId, tuple[float, TcpAddress]] = OrderedDict()

    async def ask(self, relay_id: PeerId) -> TcpAddress | None:
        """None where the relay cannot tell."""
        asked_s, seen_at = self._seen.get(relay_id, (-LIFETIME_S, None))
        if trio.current_time() - asked_s < LIFETIME_S:
            return seen_at
        try:
            with trio.move_on_after(ASK_TIMEOUT_S):
                report = await ask_peer(self._network, relay_id, [])
                self._remember(relay_id, report.seen_at)
                return report.seen_at
        except (NetworkError, RemoteError) as error:
            logger.debug("relay %s does not tell where it sees us: %s", relay_id, error)
        return None

    def _remember(self, relay_id: PeerId, seen_at: TcpAddress) -> None:
        self._seen[relay_id] = trio.current_time(), seen_at
        self._seen.move_to_end(relay_id)
        if len(self._seen) > MAX_RELAYS:
            self._seen.popitem(last=False)
