"""D* Lite beside plain searches: all find equally fast routes, and D* Lite looks at fewer places."""

import sys

import pytest

from simulations.routing import run
from simulations.routing.measure import Scenario, measure


@pytest.mark.parametrize("seed", range(5))
def test_all_ways_find_equally_fast_routes_in_a_small_swarm_under_churn(seed: int) -> None:
    work = measure(Scenario(num_servers=12, num_changes=2, num_routes=25, seed=seed))
    assert {len(way.places) for way in work.values()} == {25}


def test_few_places_are_looked_at_again_after_a_change() -> None:
    work = measure(Scenario(num_servers=80, num_changes=1, num_routes=20))
    assert work["D* Lite"].mean_places < work["Dijkstra"].mean_places / 4


def test_none_are_where_nothing_changed() -> None:
    assert measure(Scenario(num_servers=30, num_routes=5))["D* Lite"].places == [0] * 5


def test_the_simulation_prints_its_question_its_seed_and_its_answer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py", "--sizes", "10", "200", "--routes", "3", "--seed", "4"])
    run.main()
    printed = capsys.readouterr().out
    assert "Is D* Lite worth it?" in printed
    assert "seed 4" in printed
    rows = [line.split()[:2] for line in printed.splitlines() if line.count("|") == 4]
    assert rows[2:] == [["10", "0"], ["10", "1"], ["200", "0"], ["200", "1"], ["200", "2"]]
