"""How far away a peer is, for whoever plans routes."""

import trio

from p2pswarm.core.ids import PeerId
from p2pswarm.net.network import Network
from p2pswarm.rpc.client import RpcClient


async def measure_round_trip_s(network: Network, rpc: RpcClient, peer_id: PeerId, timeout_s: float) -> float:
    """What the keep-alive of an open connection has measured; without one, the peer is dialled. Raises as `rpc` does.

    Takes two times `timeout_s` at most.
    """
    measured_s = network.round_trip_s(peer_id)
    if measured_s is None:
        await rpc.info(peer_id, timeout_s)  # dials, and most connections measure themselves at once
        measured_s = network.round_trip_s(peer_id)
    if measured_s is None:
        asked_at_s = trio.current_time()
        await rpc.info(peer_id, timeout_s)
        measured_s = trio.current_time() - asked_at_s
    return measured_s
