"""Servers in use are killed and stopped while a real model generates: the text is the local model's all the same.

The short version of `simulations/failover`; `python -m simulations.failover.run` is the long one.
"""

import sys
from collections.abc import Iterator

import pytest
import torch
import trio

from p2pswarm.client.config import ClientConfig
from p2pswarm.client.swarm import open_swarm
from simulations.failover import run
from simulations.failover.generations import Outcome, Plan, Strike, generate_all, local_answers
from simulations.failover.processes import ReplicasPlan, open_replicas
from swarm_cli.sample_model import sample_model

pytestmark = pytest.mark.real

PLAN = Plan(num_generations=1, num_tokens=56, tokens_between_strikes=22)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As the servers: sums are then made in the same order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


async def generate_under_both_strikes(plan: Plan) -> list[Outcome]:
    answers = await trio.to_thread.run_sync(local_answers, sample_model(), plan)
    async with (
        open_replicas(ReplicasPlan(sample_model(), run.SPANS)) as replicas,
        open_swarm(replicas.addresses, config=ClientConfig(known_peers_path=None)) as swarm,
    ):
        model = await swarm.load(sample_model())
        return [await generate_all(model, replicas, answers, strike, plan) for strike in Strike]


def test_text_is_the_local_models_while_servers_are_killed_and_stopped(one_thread: None) -> None:
    for outcome in trio.run(generate_under_both_strikes, PLAN):
        assert outcome.errors == []
        assert outcome.num_equal == PLAN.num_generations
        assert outcome.num_strikes >= 2 * PLAN.num_generations
        assert outcome.num_recoveries >= outcome.num_strikes / 2


@pytest.mark.exhaustive
@pytest.mark.slow
def test_the_simulation_prints_its_question_its_seed_and_its_answer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], one_thread: None
) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py", "--generations", "1", "--seed", "4"])
    run.main()
    printed = capsys.readouterr().out
    assert "Does a user see the same text" in printed
    assert "seed=4" in printed
    for strike in Strike:
        assert f"{strike.value:8}   1 of   1 equal" in printed
        for span in run.SPANS:
            assert f"{strike.value:8} blocks {span!s:6} prefill" in printed
