"""The file of known peers: bounded, survives damage, written whole."""

import json
import logging
from pathlib import Path

import pytest

from p2pswarm.dht.bad_peers import BadPeers
from p2pswarm.dht.contact import Contact
from p2pswarm.dht.known_peers import MAX_KNOWN_PEERS, KnownPeers
from p2pswarm.net.identity import Identity


def contact(number: int) -> Contact:
    peer_id = Identity.generate(number.to_bytes(32, "big")).peer_id
    return Contact(peer_id, (f"/ip4/10.0.0.1/tcp/4001/p2p/{peer_id}", f"/ip4/10.0.0.2/tcp/4001/p2p/{peer_id}"))


def test_peers_that_answered_are_there_after_a_restart_the_latest_first(tmp_path: Path):
    known = KnownPeers(tmp_path / "new" / "peers.json")
    for number in (1, 2, 1):
        known.answered(contact(number))
    known.save()
    assert KnownPeers(tmp_path / "new" / "peers.json").contacts() == [contact(1), contact(2)]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["peers.json"]


def test_only_the_latest_are_kept(tmp_path: Path):
    known = KnownPeers(tmp_path / "peers.json")
    for number in range(1, MAX_KNOWN_PEERS + 10):
        known.answered(contact(number))
    assert len(known.contacts()) == MAX_KNOWN_PEERS
    assert contact(1) not in known.contacts()


def test_who_only_asked_us_never_takes_the_place_of_one_that_answered():
    known = KnownPeers(None)
    known.asked_us(contact(500))
    for number in range(1, MAX_KNOWN_PEERS + 1):
        known.answered(contact(number))
    known.asked_us(contact(501))
    assert set(known.contacts()) == {contact(number) for number in range(1, MAX_KNOWN_PEERS + 1)}


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "7", '{"peers": 7}', '{"peers": [7]}', '{"version": 1}', '{"peers": ["nonsense"]}']
)
def test_a_damaged_file_is_as_good_as_none(tmp_path: Path, content: str):
    path = tmp_path / "peers.json"
    path.write_text(content)
    known = KnownPeers(path)
    assert known.contacts() == []
    known.answered(contact(1))
    known.save()
    assert json.loads(path.read_text())["peers"] == list(contact(1).addresses)


def test_a_file_that_cannot_be_written_is_told_and_does_no_harm(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "file").write_text("in the way")
    known = KnownPeers(None)
    known.save()
    known = KnownPeers(tmp_path / "peers.json")
    (tmp_path / "peers.json").mkdir()
    known.answered(contact(1))
    with caplog.at_level(logging.WARNING):
        known.save()
    assert "cannot save the known peers" in caplog.text


def test_a_silent_peer_is_left_alone_longer_each_time_and_forgiven_when_it_answers():
    bad = BadPeers(first_s=10, most_s=30)
    peer_id = contact(1).peer_id
    bad.failed(peer_id, 0)
    bad.failed(peer_id, 1)
    assert bad.is_bad(peer_id, 9)
    assert not bad.is_bad(peer_id, 10)
    bad.failed(peer_id, 20)
    assert bad.is_bad(peer_id, 39)
    assert not bad.is_bad(peer_id, 40)
    bad.failed(peer_id, 50)
    assert not bad.is_bad(peer_id, 80)
    bad.failed(peer_id, 90)
    bad.answered(peer_id)
    assert not bad.is_bad(peer_id, 91)
