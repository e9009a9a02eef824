"""What a server announces follows what is so, and is announced again after an outage."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import trio
from fixed_reach import FixedReach
from trio.testing import MockClock

from p2pswarm.core.ids import ModelId, PeerId
from p2pswarm.core.server_info import ServerInfo, ServerState
from p2pswarm.core.span import Span
from swarmd.figures import Figures
from swarmd.presence import FIGURES_CHECK_PERIOD_S, SWARM_CHECK_PERIOD_S, Presence


class NotingAnnouncer:
    """Takes announcements down instead of sending them."""

    def __init__(self) -> None:
        self.announced: list[ServerInfo] = []

    async def announce(self, info: ServerInfo) -> int:
        self.announced.append(info)
        return 1


@dataclass
class FixedRoom:
    tokens_left: int = 1000
    total_tokens: int = 1000


@dataclass
class FixedWaiting:
    queue_delay_s: float = 0.0


@dataclass
class FixedNeighbours:
    round_trips_s: Mapping[PeerId, float] = field(default_factory=dict)


class NotingEvents:
    def __init__(self) -> None:
        self.names: list[str] = []

    def __call__(self, event: str, **fields: object) -> None:
        self.names.append(event)


def unchanged(info: ServerInfo) -> ServerInfo:
    return info


class ChangingReach:
    """Addresses that become known, and others."""

    def __init__(self) -> None:
        self.next_change = trio.Event()
        self._settled = trio.Event()
        self._addresses: tuple[str, ...] = ()

    async def wait_settled(self) -> None:
        await self._settled.wait()

    def stamped(self, info: ServerInfo) -> ServerInfo:
        return replace(info, addresses=self._addresses)

    def move(self, *addresses: str) -> None:
        self._addresses = addresses
        self._settled.set()
        self.next_change.set()
        self.next_change = trio.Event()


def make_presence(reach: ChangingReach | None = None) -> tuple[NotingAnnouncer, Presence]:
    info = ServerInfo(
        peer_id=PeerId("12D3KooWabc"),
        model_id=ModelId("tiny@0123456789abcdef"),
        span=Span(0, 4),
        state=ServerState.ONLINE,
        addresses=(),
        num_model_blocks=8,
        throughput_tokens_per_s=1.0,
        inference_tokens_per_s=1.0,
        forward_tokens_per_s=1.0,
        network_tokens_per_s=1.0,
        dtype="float32",
        cache_tokens_left=1000,
    )
    announcer = NotingAnnouncer()
    return announcer, Presence(announcer, info, reach or FixedReach())


async def test_a_change_of_state_is_announced_and_remembered() -> None:
    announcer, presence = make_presence()
    await presence.become(ServerState.DRAINING)
    assert [info.state for info in announcer.announced] == [ServerState.DRAINING]
    assert presence.info.state is ServerState.DRAINING


async def test_the_room_in_the_cache_is_corrected_when_it_matters(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    announcer, presence = make_presence()
    room = FixedRoom()
    nursery.start_soon(presence.follow_figures, Figures(room, FixedWaiting(), FixedNeighbours(), unchanged))

    async def announced_rooms() -> Sequence[int]:
        await trio.sleep(3 * FIGURES_CHECK_PERIOD_S)
        return [info.cache_tokens_left for info in announcer.announced]

    room.tokens_left = 900
    assert await announced_rooms() == []
    room.tokens_left = 0
    assert await announced_rooms() == [0]
    room.tokens_left = 900
    assert await announced_rooms() == [0, 900]


async def test_all_figures_go_out_together_and_at_a_bounded_rate(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    announcer, presence = make_presence()
    waiting, neighbours = FixedWaiting(), FixedNeighbours()
    nursery.start_soon(presence.follow_figures, Figures(FixedRoom(), waiting, neighbours, unchanged))
    for change in range(1, 101):
        waiting.queue_delay_s = float(change % 2)
        neighbours.round_trips_s = {PeerId("next"): 1.05**change}
        await trio.sleep(FIGURES_CHECK_PERIOD_S / 10)
    assert 9 <= len(announcer.announced) <= 10
    last = announcer.announced[-1]
    assert last.next_rtts_s[PeerId("next")] > 1.05**80
    assert (last.state, last.cache_tokens_left) == (ServerState.ONLINE, 1000)


async def test_an_outage_is_told_once_and_ends_with_a_new_announcement(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    announcer, presence = make_presence()
    events = NotingEvents()
    num_nodes = 3
    nursery.start_soon(presence.follow_swarm, lambda: num_nodes, events)
    await trio.sleep(3 * SWARM_CHECK_PERIOD_S)
    assert events.names == []
    num_nodes = 0
    await trio.sleep(3 * SWARM_CHECK_PERIOD_S)
    assert events.names == ["swarm_lost"]
    num_nodes = 2
    await trio.sleep(3 * SWARM_CHECK_PERIOD_S)
    assert events.names == ["swarm_lost", "swarm_found"]
    assert announcer.announced == [presence.info]


async def test_nothing_is_announced_before_it_is_known_how_others_reach_us(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    reach = ChangingReach()
    announcer, presence = make_presence(reach)
    nursery.start_soon(presence.become, ServerState.ONLINE)
    await trio.sleep(1)
    assert announcer.announced == []
    reach.move("/by/relay")
    await trio.sleep(1)
    assert [info.addresses for info in announcer.announced] == [("/by/relay",)]
    assert presence.info.addresses == ("/by/relay",)


async def test_a_new_way_to_reach_us_is_announced_once(autojump_clock: MockClock, nursery: trio.Nursery) -> None:
    reach = ChangingReach()
    announcer, presence = make_presence(reach)
    reach.move("/by/one")
    nursery.start_soon(presence.follow_reach)
    await trio.sleep(1)
    for address in ("/by/one", "/by/other", "/by/other"):
        reach.move(address)
        await trio.sleep(1)
    assert [info.addresses for info in announcer.announced] == [("/by/one",), ("/by/other",)]
