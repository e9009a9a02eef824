"""Which addresses a node tells others, by how it can be reached."""

from p2pswarm.core.reachability import Reachability
from p2pswarm.net.addresses import TcpAddress
from p2pswarm.net.nat.own_addresses import addresses_to_publish, dial_back_ports

LAN = TcpAddress("ip4", "192.168.1.7", 4001)
LOOPBACK = TcpAddress("ip4", "127.0.0.1", 4001)
FORWARDED = TcpAddress("ip4", "198.51.100.7", 31337)
CIRCUIT = "/ip4/203.0.113.9/tcp/4001/p2p/R/p2p-circuit"
LISTENING = (LAN, LOOPBACK)


def test_where_it_listens_is_enough_while_nothing_else_is_known():
    assert addresses_to_publish(Reachability.UNKNOWN, (), LISTENING, ()) is None
    assert addresses_to_publish(Reachability.PUBLIC, (LAN, LOOPBACK), LISTENING, ()) is None


def test_a_port_that_a_router_forwards_comes_first():
    assert addresses_to_publish(Reachability.PUBLIC, (FORWARDED, LAN), LISTENING, ()) == (
        "/ip4/198.51.100.7/tcp/31337",
        "/ip4/192.168.1.7/tcp/4001",
        "/ip4/127.0.0.1/tcp/4001",
    )


def test_behind_a_router_only_what_works_is_told():
    assert addresses_to_publish(Reachability.PRIVATE, (), LISTENING, ()) == ()
    assert addresses_to_publish(Reachability.PRIVATE, (LAN,), LISTENING, (CIRCUIT,)) == (str(LAN), CIRCUIT)


def test_each_port_is_asked_for_once_the_forwarded_one_first():
    listening = (TcpAddress("ip6", "2001:db8::7", 4002), LAN, LOOPBACK)
    assert dial_back_ports(listening, None) == [4001, 4002]
    assert dial_back_ports(listening, 31337) == [31337, 4001, 4002]
    assert dial_back_ports(listening, 4001) == [4001, 4002]
