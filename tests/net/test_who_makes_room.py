"""Who makes room when a node has all the connections it may: first whoever has more than a share from one address."""

from dataclasses import dataclass

from p2pswarm.net.addresses import TcpAddress
from p2pswarm.net.admission import Source
from p2pswarm.net.idleness import who_makes_room
from p2pswarm.net.path import ConnectionPath

HOME, OFFICE, NEWCOMER = "203.0.113.1", "203.0.113.2", Source("203.0.113.3")


@dataclass(frozen=True)
class Connection:
    """As it looks from outside."""

    host: str
    idle_since_s: float | None = None
    is_closed: bool = False

    @property
    def path(self) -> ConnectionPath:
        return ConnectionPath(remote=TcpAddress("ip4", self.host, 1000))


def test_the_one_idle_longest_makes_room() -> None:
    longest = Connection(HOME, idle_since_s=3.0)
    others = [Connection(OFFICE, idle_since_s=4.0), Connection(HOME), Connection(OFFICE, 1.0, is_closed=True)]
    assert who_makes_room([others[0], longest, *others[1:]], NEWCOMER, 16) is longest


def test_nobody_makes_room_where_all_are_in_use() -> None:
    assert who_makes_room([Connection(HOME), Connection(OFFICE)], NEWCOMER, 16) is None
    assert who_makes_room([], NEWCOMER, 16) is None


def test_an_address_with_more_than_its_share_makes_room_before_others() -> None:
    crowd = [Connection(HOME, idle_since_s=9.0), *[Connection(HOME) for _ in range(3)]]
    assert who_makes_room([Connection(OFFICE, idle_since_s=1.0), *crowd], NEWCOMER, 16) is crowd[0]


def test_an_address_with_more_than_its_share_makes_room_even_where_all_are_in_use() -> None:
    crowd = [Connection(HOME, is_closed=number == 4) for number in range(5)]
    assert who_makes_room([*crowd, Connection(OFFICE)], NEWCOMER, 16) is crowd[3]


def test_an_address_does_not_make_room_for_one_more_of_its_own() -> None:
    crowd = [Connection(HOME) for _ in range(10)]
    assert who_makes_room(crowd, Source(HOME), 16) is None


def test_an_address_within_its_share_keeps_what_is_in_use() -> None:
    assert who_makes_room([Connection(HOME), Connection(HOME), Connection(OFFICE)], NEWCOMER, 64) is None
