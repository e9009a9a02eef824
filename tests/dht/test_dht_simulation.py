"""The DHT as a whole, a third of it dead or hung and some lying: all that lives is found, fast, and nothing bad."""

import sys

import pytest

from simulations.dht import run
from simulations.dht.scenario import Scenario, simulate

TINY = Scenario(num_nodes=25, num_keys=2, owners_per_key=4, num_lookups=10)


def test_a_tiny_swarm_finds_everything_and_lets_nothing_bad_through():
    outcome = simulate(TINY)
    assert outcome.num_expected == 40
    assert outcome.num_missing == 0
    assert outcome.num_lies > 0
    assert not outcome.bad_records


def test_the_simulation_prints_its_question_its_seed_and_its_answer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    flags = "--nodes 10 --keys 1 --owners 2 --lookups 3 --seed 4 --dead 0.1 --hung 0 --lying 0"
    monkeypatch.setattr(sys, "argv", ["run.py", *flags.split()])
    run.main()
    printed = capsys.readouterr().out
    assert "Does the DHT find everything" in printed
    assert "seed=4" in printed
    assert "records found        6 of 6" in printed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_nodes", "num_lookups"), [(200, 60), pytest.param(500, 200, marks=pytest.mark.exhaustive)]
)
def test_of_hundreds_of_nodes_a_third_dead_or_hung_all_records_are_found_fast(num_nodes: int, num_lookups: int):
    size = {"num_nodes": num_nodes, "num_lookups": num_lookups}
    outcome = simulate(Scenario(**size, dead=0.3, hung=0.05, lying=0.05, latency_s=0.025))
    assert outcome.num_expected == 10 * num_lookups
    assert outcome.num_missing == 0
    assert outcome.num_lies > 5 * num_lookups
    assert not outcome.bad_records
    assert outcome.median_lookup_s < 1.0
