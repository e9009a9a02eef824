"""Breaks a `ChaosSwarm` at random, by a seed, and mends it again; every block keeps a server that is well."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import trio
from chaos_swarm import LATENCY_S, ChaosSwarm, Server

from p2pswarm.client.session import Session
from p2pswarm.core.span import Span, uncovered
from p2pswarm.testing.faulty_service import Fault
from p2pswarm.testing.memory_network import Link

MEAN_PAUSE_S = 4.0
"""Between two events."""
SHORTEST_TROUBLE_S, LONGEST_TROUBLE_S = 1.0, 60.0
ON_ROUTE = 0.7
"""The share of troubles that hit a server in use, as far as there is one that may be hit."""
MAX_SERVERS = 14
FAULTS = [fault for fault in Fault if fault is not Fault.REFUSES]
"""When two servers say that a step is wrong, it is, as far as a client can know."""


@dataclass
class ChaosDriver:
    """`run` it beside a session. `events` is what it did, for the message of a test that fails."""

    swarm: ChaosSwarm
    session: Session
    randomness: random.Random
    events: list[str] = field(default_factory=list)
    num_troubles: dict[str, int] = field(default_factory=dict)
    _ill: set[Server] = field(default_factory=set)
    _cut_off: set[Server] = field(default_factory=set)

    def note(self, event: str) -> None:
        self.events.append(f"{trio.current_time() - self.began_s:9.3f} s  {event}")

    def __post_init__(self) -> None:
        self.began_s = trio.current_time()

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            while True:
                await trio.sleep(self.randomness.expovariate(1 / MEAN_PAUSE_S))
                self._next(nursery)

    def _next(self, nursery: trio.Nursery) -> None:
        kind = self.randomness.choice([*TROUBLES, "latency", "join"])
        if kind == "latency":
            self._change_latency()
        elif kind == "join":
            if len(self.swarm.servers) < MAX_SERVERS:
                nursery.start_soon(self._start, self._some_span(), None)
        elif (server := self._victim()) is not None:
            self._ill.add(server)
            self.num_troubles[kind] = self.num_troubles.get(kind, 0) + 1
            nursery.start_soon(self._trouble, kind, server)

    def _victim(self) -> Server | None:
        """A server that is well and can be spared."""
        well = [server for server in self.swarm.servers.values() if server not in self._ill]
        spare = [server for server in well if self._can_be_spared(server, well)]
        in_use = [server for server in self.swarm.serving(self.session) if server in spare]
        if in_use and self.randomness.random() < ON_ROUTE:
            spare = in_use
        return self.randomness.choice(spare) if spare else None

    def _can_be_spared(self, server: Server, well: list[Server]) -> bool:
        others = [other.span for other in well if other is not server]
        return not uncovered(others, self.swarm.model.facts.span)

    async def _trouble(self, kind: str, server: Server) -> None:
        time_s = self.randomness.uniform(SHORTEST_TROUBLE_S, LONGEST_TROUBLE_S)
        self.note(f"{server}: {kind} for {time_s:.1f} s")
        await TROUBLES[kind](self, server, time_s)
        self.note(f"{server}: well again, or gone")
        self._ill.discard(server)

    async def kill(self, server: Server, time_s: float) -> None:
        self.swarm.kill(server)
        await trio.sleep(time_s)
        await self._come_back(server)

    async def drain(self, server: Server, time_s: float) -> None:
        await self.swarm.drain(server, self.randomness.choice([0.0, 1.0, 10.0]))
        await trio.sleep(time_s)
        await self._come_back(server)

    async def hang(self, server: Server, time_s: float) -> None:
        self.swarm.memory.hang(server.peer_id)
        await trio.sleep(time_s)
        self.swarm.memory.resume(server.peer_id)

    async def cut_off(self, server: Server, time_s: float) -> None:
        self._cut_off.add(server)
        self.swarm.cut_off(self._cut_off)
        await trio.sleep(time_s)
        self._cut_off.remove(server)
        self.swarm.cut_off(self._cut_off)

    async def say_garbage(self, server: Server, time_s: float) -> None:
        server.garbler.is_on = True
        await trio.sleep(time_s)
        server.garbler.is_on = False

    async def be_faulty(self, server: Server, time_s: float) -> None:
        server.service.fault = self.randomness.choice(FAULTS)
        self.note(f"{server}: {server.service.fault.value}")
        await trio.sleep(time_s)
        server.service.fault = None

    async def _come_back(self, server: Server) -> None:
        """The same peer or a new one."""
        await self._start(server.span, self.randomness.choice([server.number, None]))

    async def _start(self, span: Span, number: int | None) -> None:
        self.note(f"{await self.swarm.start(span, number)}: starts")

    def _some_span(self) -> Span:
        num_blocks = self.swarm.model.facts.num_blocks
        start = self.randomness.randrange(num_blocks)
        return Span(start, self.randomness.randint(start + 1, num_blocks))

    def _change_latency(self) -> None:
        """Of one path, between the client and a server or between two servers, which matters where they push."""
        peers = [*self.swarm.servers, self.swarm.network.peer_id]
        one, other = self.randomness.sample(peers, 2)
        factor, loss = 2 ** self.randomness.uniform(-3, 4), self.randomness.choice([0.0, 0.0, 0.05, 0.2])
        self.swarm.memory.set_link(one, other, Link(latency_s=LATENCY_S * factor, loss=loss))
        self.note(f"a path has {1000 * LATENCY_S * factor:.0f} ms now and loses {loss:.0%}")


TROUBLES: dict[str, Callable] = {
    "kill": ChaosDriver.kill,
    "hang": ChaosDriver.hang,
    "cut off": ChaosDriver.cut_off,
    "faulty": ChaosDriver.be_faulty,
    "garbage": ChaosDriver.say_garbage,
    "drain": ChaosDriver.drain,
}
