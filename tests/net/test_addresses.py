import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pswarm.core.errors import ConfigError
from p2pswarm.core.ids import PeerId
from p2pswarm.net.address_book import MAX_ADDRESSES_PER_PEER, MAX_PEERS, AddressBook
from p2pswarm.net.addresses import (
    CircuitAddress,
    TcpAddress,
    expand_wildcards,
    is_dialable,
    join_peer_address,
    parse_address,
    parse_tcp_address,
    split_peer_address,
)
from p2pswarm.net.identity import Identity

ALICE = Identity.generate(bytes(32)).peer_id
BOB = Identity.generate(bytes(range(32))).peer_id


@pytest.mark.parametrize(
    "transport",
    ["/ip4/127.0.0.1/tcp/0", "/ip6/::1/tcp/65535", "/ip6/2001:db8::2/tcp/4001", "/dns4/a-b.example.org/tcp/443"],
)
def test_peer_address_splits_and_joins(transport: str) -> None:
    assert split_peer_address(f"{transport}/p2p/{ALICE}") == (transport, ALICE)
    assert join_peer_address(transport, ALICE) == f"{transport}/p2p/{ALICE}"


@pytest.mark.parametrize(
    "address",
    [
        "",
        "/",
        "/p2p/",
        f"/p2p/{ALICE}",
        "/ip4/127.0.0.1/tcp/1",
        "/ip4/127.0.0.1/tcp/1/p2p/Qm",
        f"/ip4/127.0.0.1/p2p/{ALICE}",
        f"/ip4/127.0.0.256/tcp/1/p2p/{ALICE}",
        f"/ip4/127.0.0.1/tcp/65536/p2p/{ALICE}",
        f"/ip4/127.0.0.1/tcp/-1/p2p/{ALICE}",
        f"/ip4/127.0.0.1/tcp/²/p2p/{ALICE}",
        f"/ip4/127.0.0.1/udp/1/p2p/{ALICE}",
        f"/ip4/127.0.0.1/tcp/1/ws/p2p/{ALICE}",
        f"/ip6/127.0.0.1/tcp/1/p2p/{ALICE}",
        f"/dns4/a..b/tcp/1/p2p/{ALICE}",
        f"/dns4/a b/tcp/1/p2p/{ALICE}",
        f"/dns4/{'a' * 1000}/tcp/1/p2p/{ALICE}",
        f"127.0.0.1:4001/p2p/{ALICE}",
        f"/ip4/1.1.1.1/tcp/1/p2p/{BOB}/p2p-circuit",
        f"/ip4/1.1.1.1/tcp/1/p2p-circuit/p2p/{ALICE}",
        f"/p2p/{BOB}/p2p-circuit/p2p/{ALICE}",
        f"/ip4/1.1.1.1/tcp/1/p2p/{BOB}/p2p-circuit/p2p/{BOB}/p2p-circuit/p2p/{ALICE}",
    ],
)
def test_malformed_peer_address_is_a_config_error_that_shows_it(address: str) -> None:
    with pytest.raises(ConfigError, match="not a multiaddr"):
        split_peer_address(address)
    assert not is_dialable(address)


def test_circuit_address_names_the_relay_and_where_it_is() -> None:
    transport = f"/ip4/1.1.1.1/tcp/7/p2p/{BOB}/p2p-circuit"
    assert split_peer_address(f"{transport}/p2p/{ALICE}") == (transport, ALICE)
    assert parse_address(transport) == CircuitAddress(TcpAddress("ip4", "1.1.1.1", 7), BOB)
    assert str(parse_address(transport)) == transport
    assert is_dialable(f"{transport}/p2p/{ALICE}")
    assert not is_dialable(f"/ip4/0.0.0.0/tcp/7/p2p/{BOB}/p2p-circuit/p2p/{ALICE}")


@given(st.text(max_size=600))
def test_arbitrary_text_is_an_address_or_a_config_error(text: str) -> None:
    for address in (text, f"{text}/p2p/{ALICE}", f"/ip4/{text}/tcp/1/p2p/{ALICE}", f"/dns/{text}/tcp/1/p2p/{ALICE}"):
        with contextlib.suppress(ConfigError):
            transport, peer_id = split_peer_address(address)
            assert split_peer_address(join_peer_address(transport, peer_id)) == (transport, peer_id)


@pytest.mark.parametrize(
    ("transport", "wanted"),
    [
        ("/ip4/10.0.0.1/tcp/4001", True),
        ("/dns/example.org/tcp/4001", True),
        ("/ip4/10.0.0.1/tcp/0", False),
        ("/ip4/0.0.0.0/tcp/4001", False),
        ("/ip6/::/tcp/4001", False),
    ],
)
def test_ports_zero_and_wildcards_cannot_be_dialled(transport: str, wanted: bool) -> None:
    assert is_dialable(join_peer_address(transport, ALICE)) == wanted


def test_wildcards_become_the_interfaces_of_their_family_with_loopback_last() -> None:
    hosts = ["127.0.0.1", "::1", "192.0.2.7", "2001:db8::7"]
    listening = [TcpAddress("ip4", "0.0.0.0", 1), TcpAddress("ip6", "::", 2), TcpAddress("ip4", "198.51.100.1", 3)]
    assert [str(address) for address in expand_wildcards(listening, hosts)] == [
        "/ip4/192.0.2.7/tcp/1",
        "/ip6/2001:db8::7/tcp/2",
        "/ip4/198.51.100.1/tcp/3",
        "/ip4/127.0.0.1/tcp/1",
        "/ip6/::1/tcp/2",
    ]


def test_address_without_a_peer_id_is_parsed_and_written_alike() -> None:
    assert str(parse_tcp_address("/ip6/0:0:0:0:0:0:0:1/tcp/5")) == "/ip6/::1/tcp/5"


def test_book_keeps_what_can_be_dialled_and_belongs_to_the_peer() -> None:
    book = AddressBook()
    book.add(
        ALICE,
        [
            "/ip4/10.0.0.1/tcp/1",
            f"/ip4/10.0.0.2/tcp/2/p2p/{ALICE}",
            f"/ip4/10.0.0.3/tcp/3/p2p/{BOB}",
            "/ip4/0.0.0.0/tcp/4",
            "/ip4/10.0.0.5/tcp/0",
            "rubbish",
        ],
    )
    assert book.get(ALICE) == ["/ip4/10.0.0.1/tcp/1", "/ip4/10.0.0.2/tcp/2"]
    assert book.get(BOB) == []


def test_book_forgets_the_oldest_addresses_of_a_peer_and_gives_the_newest_first() -> None:
    book = AddressBook()
    for port in range(1, 100):
        book.add(ALICE, [f"/ip4/10.0.0.1/tcp/{port}"])
    assert len(book.get(ALICE)) == MAX_ADDRESSES_PER_PEER
    assert book.get(ALICE)[:2] == ["/ip4/10.0.0.1/tcp/99", "/ip4/10.0.0.1/tcp/98"]


def test_address_where_a_peer_answered_stays_first_whatever_strangers_say() -> None:
    book = AddressBook()
    book.add(ALICE, ["/ip4/10.0.0.1/tcp/1"])
    book.prove(ALICE, "/ip4/10.0.0.1/tcp/1")
    book.add(ALICE, [f"/ip4/10.6.6.6/tcp/{port}" for port in range(1, 100)])
    assert book.get(ALICE)[0] == "/ip4/10.0.0.1/tcp/1"
    assert len(book.get(ALICE)) == MAX_ADDRESSES_PER_PEER + 1


def test_book_forgets_the_peers_not_heard_of_for_longest() -> None:
    book = AddressBook()
    peers = [PeerId(f"peer {number}") for number in range(MAX_PEERS + 10)]
    for peer_id in peers:
        book.add(peer_id, ["/ip4/10.0.0.1/tcp/1"])
    assert not book.get(peers[9])
    assert book.get(peers[10])
