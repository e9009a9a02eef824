"""A server finds out how fast its line is from other servers, once, and remembers it for a day."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock

from p2pswarm.core.ids import ModelId, PeerId
from p2pswarm.core.server_info import ServerInfo, ServerState
from p2pswarm.core.span import Span
from p2pswarm.rpc.client import RpcClient
from p2pswarm.rpc.limits import RpcLimits
from p2pswarm.rpc.server import RpcServer
from p2pswarm.testing.arithmetic_model import arithmetic_server_info
from p2pswarm.testing.memory_network import Link, MemoryNetwork
from p2pswarm.testing.running_sum_service import RunningSumService
from p2pswarm.testing.simulated_clock import SimulatedClock
from swarmd.line_speed import LOOK_PERIOD_S, MAX_PEERS, Line, RememberedLine, hosts, line_speed, whom_to_measure
from swarmd.throughput import ASSUMED_LINE_BITS_PER_S

OWN = ("/ip4/127.0.0.1/tcp/1/p2p/me", "/ip4/192.0.2.1/tcp/1/p2p/me")
MODEL = ModelId("tiny@0123456789abcdef")


class FixedClock:
    def __init__(self) -> None:
        self.now_s = 1e9

    def unix_time_s(self) -> float:
        return self.now_s


class FixedDirectory:
    """Knows whom the test says."""

    def __init__(self) -> None:
        self.known: dict[PeerId, ServerInfo] = {}

    async def servers(self, model_id: ModelId) -> Mapping[PeerId, ServerInfo]:
        await trio.lowlevel.checkpoint()
        return self.known


class NotingEvents:
    def __init__(self) -> None:
        self.told: list[dict[str, Any]] = []

    def __call__(self, event: str, **fields: object) -> None:
        self.told.append({"event": event} | fields)


def server(name: str, *addresses: str) -> ServerInfo:
    return replace(arithmetic_server_info(PeerId(name), Span(0, 4), num_model_blocks=8), addresses=addresses)


def test_slow_peers_do_not_make_a_line_slow() -> None:
    assert line_speed([5e6, 90e6, 1e6, 100e6, 95e6]) == 95e6
    assert line_speed([3e6, 90e6]) == 46.5e6
    assert line_speed([3e6]) == 3e6


@given(st.lists(st.floats(1e3, 1e10), min_size=1, max_size=5))
def test_the_speed_is_between_the_slowest_and_the_fastest(measured: list[float]) -> None:
    assert min(measured) <= line_speed(measured) <= max(measured)


def test_a_machine_is_known_by_the_hosts_of_its_addresses() -> None:
    assert hosts([*OWN, "/dns/home.example.org/tcp/31337", "nonsense"]) == {
        "127.0.0.1",
        "192.0.2.1",
        "home.example.org",
    }


def test_servers_on_the_same_machine_count_only_where_there_are_no_others() -> None:
    here, away = server("here", "/ip4/192.0.2.1/tcp/2"), server("away", "/ip4/192.0.2.9/tcp/2")
    joining = replace(server("joining", "/ip4/192.0.2.10/tcp/2"), state=ServerState.JOINING)
    assert whom_to_measure(OWN, [here, away, joining], Random(0)) == [away]
    assert whom_to_measure(OWN, [here, joining], Random(0)) == [here]
    many = [server(f"s{number}", f"/ip4/192.0.2.{number}/tcp/2") for number in range(10, 30)]
    assert len(set(map(id, whom_to_measure(OWN, many, Random(0))))) == MAX_PEERS


def test_a_speed_is_remembered_for_a_day_at_the_same_addresses(tmp_path: Path) -> None:
    clock, path = FixedClock(), tmp_path / "cache" / "lines.json"
    RememberedLine(OWN, clock, path).keep(93e6)
    assert RememberedLine(reversed(OWN), clock, path).find() == 93e6
    assert RememberedLine(OWN[:1], clock, path).find() is None
    clock.now_s += 24 * 3600
    assert RememberedLine(OWN, clock, path).find() is None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"127.0.0.1": 5}', '{"127.0.0.1": {"bits_per_s": -1.0}}'])
def test_a_damaged_file_is_nothing_remembered(tmp_path: Path, text: str) -> None:
    path = tmp_path / "lines.json"
    path.write_text(text)
    line = RememberedLine(OWN[:1], FixedClock(), path)
    assert line.find() is None
    line.keep(5e6)
    assert line.find() == 5e6


class World:
    """A server that measures, and three that it can measure against, 20 Mbit/s away but for one."""

    def __init__(self, path: Path) -> None:
        self.clock = SimulatedClock()
        self.path = path
        self.directory: Any = FixedDirectory()
        self.events = NotingEvents()
        self.memory = MemoryNetwork(Random(1), Link(0.005, bandwidth_bytes_per_s=20e6 / 8))
        self.line: Line

    async def run(self, *, patience_s: float, limits: RpcLimits | None = None, num_hidden_s: float = 0.0) -> None:
        """Measures for so long at most; others become known after a while."""
        async with self.memory.node(1) as own, trio.open_nursery() as nursery:
            self.line = Line(RememberedLine(own.addresses, self.clock, self.path), is_measured_anew=False)
            others = {}
            for number in range(2, 5):
                node = await nursery.start(self._serve, number, limits or RpcLimits())
                others[node.peer_id] = server(node.peer_id, *node.addresses)
            slow = next(iter(others))
            self.memory.set_link(own.peer_id, slow, Link(0.005, bandwidth_bytes_per_s=1e6 / 8))

            async def appear() -> None:
                await trio.sleep(num_hidden_s)
                self.directory.known = others

            nursery.start_soon(appear)
            with trio.move_on_after(patience_s):
                await self.line.measure(MODEL, self.directory, own, RpcClient(own), Random(1), self.events)
            nursery.cancel_scope.cancel()

    async def _serve(self, number: int, limits: RpcLimits, *, task_status: trio.TaskStatus[Any]) -> None:
        async with self.memory.node(number) as node, trio.open_nursery() as nursery:
            await nursery.start(RpcServer(node, RunningSumService(), limits).run)
            task_status.started(node)


async def test_the_line_is_measured_as_soon_as_there_are_others(tmp_path: Path, autojump_clock: MockClock) -> None:
    world = World(tmp_path / "lines.json")
    await world.run(patience_s=3 * LOOK_PERIOD_S + 60, num_hidden_s=2 * LOOK_PERIOD_S)
    assert world.line.is_known
    assert world.line.bits_per_s == pytest.approx(20e6, rel=0.25)
    assert world.events.told == [{"event": "line_measured", "bits_per_s": round(world.line.bits_per_s), "num_peers": 3}]
    again = World(world.path)
    again.clock = world.clock
    await again.run(patience_s=0.1)
    assert again.line.bits_per_s == world.line.bits_per_s
    assert again.events.told == []


async def test_a_line_that_cannot_be_remembered_is_known_all_the_same(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    (tmp_path / "file").write_text("no folder")
    world = World(tmp_path / "file" / "lines.json")
    await world.run(patience_s=60)
    assert world.line.is_known


async def test_without_others_the_assumption_stays(tmp_path: Path, autojump_clock: MockClock) -> None:
    world = World(tmp_path / "lines.json")
    await world.run(patience_s=3600, num_hidden_s=7200)
    assert (world.line.is_known, world.line.bits_per_s) == (False, ASSUMED_LINE_BITS_PER_S)
    assert not world.path.exists()


async def test_servers_that_grant_no_test_are_no_help_and_no_harm(tmp_path: Path, autojump_clock: MockClock) -> None:
    world = World(tmp_path / "lines.json")
    await world.run(patience_s=600, limits=RpcLimits(max_speed_test_bytes=1000))
    assert not world.line.is_known
