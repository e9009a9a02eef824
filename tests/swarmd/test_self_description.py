"""What a server tells its operator of how others join."""

from dataclasses import replace

from p2pswarm.core.ids import ModelId, PeerId
from p2pswarm.core.server_info import ServerInfo, ServerState
from p2pswarm.core.span import Span
from swarmd.config import ServerConfig
from swarmd.self_description import address_to_join_by

FIRST = "/ip4/192.0.2.7/tcp/4001/p2p/12D3KooWDpJ7As7BWAwRMfu1VU2WCqNjvq387JEYKDBj4kx6nXTN"
OWN = "/ip4/198.51.100.4/tcp/4001/p2p/12D3server"
INFO = ServerInfo(
    PeerId("12D3server"), ModelId("m@0"), Span(0, 1), ServerState.ONLINE, (OWN,), 1, 1.0, 1.0, 1.0, 1.0, "float32"
)
RELAYED = replace(INFO, using_relay=True)


def test_others_join_by_a_server_that_can_be_dialled() -> None:
    assert address_to_join_by(ServerConfig(model="m", peers=(FIRST,)), INFO) == OWN


def test_others_join_by_the_peer_of_a_server_that_cannot_be_dialled() -> None:
    assert address_to_join_by(ServerConfig(model="m", peers=(FIRST,)), RELAYED) == FIRST


def test_a_server_that_remembered_its_peers_and_cannot_be_dialled_names_none() -> None:
    assert address_to_join_by(ServerConfig(model="m"), replace(RELAYED, addresses=())) == "MULTIADDR"
