"""A large swarm as a planner sees it, and what happens to it: servers join, leave, fail, slow down, move away."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from random import Random

from p2pswarm.core.ids import ModelId, PeerId
from p2pswarm.core.server_info import ServerInfo, ServerState
from p2pswarm.core.span import Span

NUM_BLOCKS = 80
"""As Llama 70B."""
SHORTEST_SPAN, LONGEST_SPAN = 4, 20
NUM_REPLICAS = 4
"""Where few servers hold the model, each holds more of it, so that a block has about as many."""
NUM_NEIGHBOURS = 10
"""Servers whose distance each one announces: as many as `swarmd` measures."""


@dataclass
class World:
    """Announcements and measured round trips, changed at random from one seed."""

    random: Random
    num_servers: int
    """At the beginning."""
    servers: dict[PeerId, ServerInfo] = field(default_factory=dict)
    round_trips_s: dict[PeerId, float] = field(default_factory=dict)
    banned: list[PeerId] = field(default_factory=list)
    """To be taken up by the planners, as failures are."""
    _num_joined: int = 0

    def __post_init__(self) -> None:
        for _ in range(self.num_servers):
            self.join()

    def join(self) -> None:
        """A server of a random size at a random place; the first ones cover the model."""
        shortest = max(SHORTEST_SPAN, NUM_BLOCKS * NUM_REPLICAS // self.num_servers * 2 // 3)
        num_blocks = self.random.randint(shortest, max(LONGEST_SPAN, 2 * shortest))
        covered = self._num_joined * shortest
        start = covered if covered < NUM_BLOCKS else self.random.randint(0, NUM_BLOCKS - num_blocks)
        span = Span(start, min(start + num_blocks, NUM_BLOCKS))
        peer_id = PeerId(f"peer{self._num_joined:06}")
        self._num_joined += 1
        rate = self.random.uniform(100, 2000)
        self.servers[peer_id] = ServerInfo(
            peer_id=peer_id,
            model_id=ModelId("simulated@0"),
            span=span,
            state=ServerState.ONLINE,
            addresses=(),
            num_model_blocks=NUM_BLOCKS,
            throughput_tokens_per_s=rate,
            inference_tokens_per_s=rate,
            forward_tokens_per_s=20 * rate,
            network_tokens_per_s=10 * rate,
            dtype="bfloat16",
            cache_tokens_left=self.random.randint(0, 100_000),
            next_rtts_s=self._distances_from(span.end),
            queue_delay_s=self._queue_delay_s(),
        )
        self.round_trips_s[peer_id] = self._distance_s()

    def leave(self) -> None:
        peer_id = self._any()
        del self.servers[peer_id], self.round_trips_s[peer_id]

    def change_distance(self) -> None:
        self.round_trips_s[self._any()] = self._distance_s()

    def change_load(self) -> None:
        peer_id = self._any()
        self.servers[peer_id] = replace(
            self.servers[peer_id],
            queue_delay_s=self._queue_delay_s(),
            cache_tokens_left=self.random.randint(0, 100_000),
        )

    def fail(self) -> None:
        self.banned.append(self._any())

    def change(self) -> None:
        """What happens to swarms, about as often: loads change more than servers do."""
        changes: list[Callable[[], None]] = [self.join, self.leave, self.fail, self.change_distance, self.change_load]
        self.random.choices(changes, [1, 1, 1, 3, 6])[0]()

    def _any(self) -> PeerId:
        return self.random.choice(list(self.servers))

    def _distance_s(self) -> float:
        return self.random.lognormvariate(-3.2, 0.8)  # half of them within 40 ms

    def _queue_delay_s(self) -> float:
        return self.random.choice([0.0, 0.0, 0.005, 0.02, 0.1])

    def _distances_from(self, end: int) -> dict[PeerId, float]:
        """To some of the servers that go on where one ends."""
        following = [peer_id for peer_id, server in self.servers.items() if server.span.covers(end)]
        chosen = self.random.sample(following, min(NUM_NEIGHBOURS, len(following)))
        return {peer_id: self._distance_s() for peer_id in chosen}
