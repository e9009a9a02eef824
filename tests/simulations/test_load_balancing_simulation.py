"""Servers that choose and move by the shipped rules, at a tiny size: near the optimum, at rest when nothing changes."""

import itertools
import sys
from collections.abc import Mapping
from random import Random

import pytest

from p2pswarm.core.ids import PeerId
from p2pswarm.core.server_info import ServerInfo, ServerState
from p2pswarm.core.span import Span
from p2pswarm.placement.rebalancing import Move
from simulations.load_balancing import run as command
from simulations.load_balancing.chart import chart
from simulations.load_balancing.experiment import HOUR_S, Cell, Size, run
from simulations.load_balancing.machines import MIXTURES, Machine
from simulations.load_balancing.optimum import exact_optimum, optimum_bound
from simulations.load_balancing.page import page, tables
from simulations.load_balancing.policies import Policy, decider
from simulations.load_balancing.world import Pace, World

TINY = Size(6, 12, 1, HOUR_S / 4)


def best_by_trying(num_model_blocks: int, machines: list[Machine]) -> float:
    """The optimum, by looking at every arrangement."""
    places = [range(num_model_blocks - machine.num_blocks + 1) for machine in machines]
    return max(
        min(
            sum(
                machine.throughput_tokens_per_s
                for machine, start in zip(machines, starts, strict=True)
                if start <= block < start + machine.num_blocks
            )
            for block in range(num_model_blocks)
        )
        for starts in itertools.product(*places)
    )


@pytest.mark.parametrize("seed", range(5))
def test_the_optimum_is_that_of_the_best_of_all_arrangements(seed: int) -> None:
    random = Random(seed)
    machines = [Machine(random.randint(2, 4), random.choice([1.0, 2.0, 3.0, 5.0])) for _ in range(4)]
    optimum = exact_optimum(6, machines, time_limit_s=20.0)
    best = best_by_trying(6, machines)
    assert optimum.found == pytest.approx(best, rel=0.02, abs=1e-6)
    assert optimum.is_exact
    assert optimum_bound(6, machines) >= best - 1e-6


def test_machines_of_one_kind_are_the_same_machine() -> None:
    assert exact_optimum(12, [Machine(3, 1.0)] * 9, time_limit_s=20.0).found == pytest.approx(2.0)
    assert optimum_bound(12, [Machine(3, 1.0)] * 9) == pytest.approx(2.25)


def covered_world(policy: Policy, seed: int = 1) -> World:
    """Six servers of ten blocks, for a model of thirty, come one after another."""
    world = World(30, decider(policy, Random(seed)), Pace(), Random(seed))
    for _ in range(6):
        world.join(Machine(10, 20.0))
        world.run_until(world.now_s + 90)
    world.run_until(world.now_s + 300)
    return world


@pytest.mark.parametrize("seed", range(3))
def test_a_covered_and_balanced_swarm_does_not_move_for_an_hour(seed: int) -> None:
    world = covered_world(Policy.SHIPPED, seed)
    assert world.throughput_online() == 40.0
    spans = {peer_id: server.info.span for peer_id, server in world.servers.items()}
    world.run_until(world.now_s + HOUR_S)
    assert world.num_moves == world.num_withdrawn == 0
    assert {peer_id: server.info.span for peer_id, server in world.servers.items()} == spans


@pytest.mark.parametrize("seed", range(3))
def test_when_two_servers_of_the_same_blocks_die_one_other_fills_the_gap_within_three_checks(seed: int) -> None:
    world = covered_world(Policy.SHIPPED, seed)
    for server in [server for server in world.servers.values() if server.info.span == Span(10, 20)]:
        world.leave(server)
    assert world.throughput() == 0
    world.run_until(world.now_s + 3 * Pace().check_period_s)
    assert world.throughput() == 20.0
    world.run_until(world.now_s + HOUR_S)
    assert world.throughput_online() == 20.0
    assert world.num_moves == 1
    assert world.num_blocks_reloaded == 10


def test_servers_that_join_at_one_moment_spread() -> None:
    world = World(12, decider(Policy.NEVER, Random(1)), Pace(), Random(1))
    for _ in range(4):
        world.join(Machine(3, 1.0))
    world.run_until(120)
    assert world.throughput_online() == 1.0


def test_a_server_that_dies_on_the_way_does_nothing_any_more() -> None:
    def always(own: ServerInfo, seen: Mapping[PeerId, ServerInfo]) -> Move | None:
        return Move(Span(4, 8), 2.0) if own.span.start == 0 else None

    for dies_after_s in range(1, 160, 7):
        world = World(8, always, Pace(), Random(5))
        server = world.join(Machine(4, 1.0))
        world.run_until(dies_after_s)
        state = server.info.state
        world.leave(server)
        world.run_until(HOUR_S)
        assert server.info.state is state
        assert world.servers == {}
    assert state in ServerState


@pytest.mark.parametrize("policy", Policy)
def test_a_swarm_comes_out_the_same_every_time(policy: Policy) -> None:
    first = run("two kinds", TINY, policy, seed=3)
    assert first == run("two kinds", TINY, policy, seed=3)
    assert first.num_calm_moves == 0
    assert first.share is None or 0 <= first.share <= 1 + 1e-3


def test_moving_is_worth_it_where_machines_are_uneven() -> None:
    size = Size(20, 24, 1, 0.0)
    shares = {policy: run("uneven", size, policy, seed=1).share or 0.0 for policy in (Policy.NEVER, Policy.SHIPPED)}
    assert shares[Policy.SHIPPED] > shares[Policy.NEVER]


def cells() -> list[Cell]:
    return [
        Cell(mixture, TINY, policy, (run(mixture, TINY, policy, 1),))
        for mixture in ("alike", "few giants")
        for policy in (Policy.NEVER, Policy.SHIPPED)
    ]


def test_the_page_and_the_picture_hold_every_cell() -> None:
    found = cells()
    text, picture = page(found), chart(found)
    assert tables(found) in text
    assert "| 6 | as shipped | 100%, 100% |" in text
    assert all(mixture in picture for mixture in MIXTURES)
    assert all(policy.value.replace("'", "&#x27;") in picture for policy in Policy)


def test_the_quick_command_prints_and_writes_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "QUICK_SIZES", (Size(5, 12, 1, 0.0),))
    monkeypatch.setattr(sys, "argv", ["run.py", "--quick"])
    monkeypatch.setattr(command.Path, "write_text", lambda *_: pytest.fail("wrote"))
    command.main()
    assert "## At rest" in capsys.readouterr().out
