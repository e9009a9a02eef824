"""Keeping two relays: finding them, losing them, giving them back."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from random import Random

import trio

from p2pswarm.core.errors import RelayRefused
from p2pswarm.core.ids import PeerId
from p2pswarm.net.nat.relay_choice import FIRST_PAUSE_S, LOST_PAUSE_S, RelayCandidate
from p2pswarm.net.nat.relay_keeper import RelayKeeper
from p2pswarm.testing.memory_network import MemoryNetwork


@dataclass
class FakeReservation:
    relay_id: PeerId
    end: trio.Event = field(default_factory=trio.Event)

    @property
    def addresses(self) -> tuple[str, ...]:
        return (f"/by/{self.relay_id}",)

    async def hold(self) -> str:
        await self.end.wait()
        return "gone"


@dataclass
class Relays:
    """A swarm of relays, some of which refuse."""

    names: list[str]
    refusing: set[str] = field(default_factory=set)
    held: dict[str, FakeReservation] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    told: list[str] = field(default_factory=list)

    def candidates(self) -> list[RelayCandidate]:
        return [RelayCandidate(PeerId(name), (f"/ip4/192.0.2.{ord(name)}/tcp/1",)) for name in self.names]

    async def reserve(self, relay_id: PeerId) -> FakeReservation:
        self.asked.append(relay_id)
        await trio.sleep(0.05 * (ord(relay_id) - ord("`")))
        if relay_id in self.refusing:
            raise RelayRefused(f"{relay_id} is full", relay_id)
        self.held[relay_id] = FakeReservation(relay_id)
        return self.held[relay_id]

    def kill(self, name: str) -> None:
        self.names.remove(name)
        self.held.pop(name).end.set()


@asynccontextmanager
async def keeping(relays: Relays) -> AsyncIterator[RelayKeeper]:
    async with MemoryNetwork(Random(1)).node(1, listens=False) as node, trio.open_nursery() as nursery:
        keeper = RelayKeeper(
            node,
            relays.reserve,  # type: ignore[arg-type]
            relays.candidates,
            lambda relay: relays.told.append(f"+{relay}"),
            lambda relay, why: relays.told.append(f"-{relay} {why}"),
        )
        nursery.start_soon(keeper.run)
        await trio.sleep(0.5)
        yield keeper
        nursery.cancel_scope.cancel()


async def test_two_relays_are_kept_and_no_more_asked(autojump_clock):
    relays = Relays(["a", "b", "c"])
    async with keeping(relays) as keeper:
        await trio.sleep(3600)
        assert keeper.addresses == ("/by/a", "/by/b")
        assert (relays.told, sorted(relays.asked)) == (["+a", "+b"], ["a", "b"])


async def test_a_relay_that_dies_is_replaced_at_once(autojump_clock):
    relays = Relays(["a", "b", "c"])
    async with keeping(relays) as keeper:
        relays.kill("a")
        await trio.sleep(0.2)
        assert keeper.addresses == ("/by/b", "/by/c")
        assert relays.told == ["+a", "+b", "-a gone", "+c"]


async def test_who_refuses_is_passed_over_and_asked_again_later(autojump_clock):
    relays = Relays(["a", "b", "c"], refusing={"a", "b"})
    async with keeping(relays) as keeper:
        await trio.sleep(1)
        assert keeper.addresses == ("/by/c",)
        relays.refusing.clear()
        await trio.sleep(FIRST_PAUSE_S + 1)
        assert keeper.addresses == ("/by/c", "/by/a")


async def test_the_only_relay_is_taken_again_when_it_is_back(autojump_clock):
    relays = Relays(["a"])
    async with keeping(relays) as keeper:
        relays.held["a"].end.set()
        await trio.sleep(0.1)
        assert keeper.addresses == ()
        await trio.sleep(LOST_PAUSE_S + 1)
        assert keeper.addresses == ("/by/a",)


async def test_a_relay_that_comes_later_is_found(autojump_clock):
    relays = Relays([])
    async with keeping(relays) as keeper:
        relays.names.append("a")
        await trio.sleep(1.2)
        assert keeper.addresses == ("/by/a",)


async def test_nothing_is_held_once_it_has_ended(autojump_clock):
    relays = Relays(["a", "b"])
    async with keeping(relays) as keeper:
        assert len(keeper.addresses) == 2
    assert keeper.addresses == ()
    assert relays.told == ["+a", "+b"]
