"""The table of failing servers at a tiny size: policies end with the true text, the model misses no lost token."""

import itertools
import statistics
import sys
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pswarm.core.span import Span
from simulations.churn import run
from simulations.churn.chart import chart
from simulations.churn.drawn import draw, losses_s
from simulations.churn.experiment import RATES, Cell, run_all
from simulations.churn.generation import Generation, simulate
from simulations.churn.page import page, tables
from simulations.churn.policies import Policy
from simulations.churn.setting import PAPER_SETTING
from simulations.churn.stage_model import StageState, embedded, next_token, true_tokens

SPAN = Span(8, 15)
TEXT = embedded([5, 17, 17, 40_000, 0, 3])


@given(cuts=st.lists(st.integers(1, 5)))
@settings(deadline=None)
def test_however_a_text_is_cut_into_calls_a_stage_answers_the_same(cuts: list[int]) -> None:
    whole = StageState(SPAN, 6).run(TEXT, 0)
    state = StageState(SPAN, 6)
    state.run(embedded([9, 9, 9]), 0)  # forgotten by going back to position 0
    bounds = [0, *sorted(set(cuts)), 6]
    answers = [state.run(TEXT[:, start:end], start) for start, end in itertools.pairwise(bounds)]
    assert torch.equal(torch.cat(answers, dim=1), whole)


@pytest.mark.parametrize("changed", [[5, 17, 40_000, 0, 3], [17, 5, 17, 40_000, 0, 3], [5, 17, 17, 17, 40_000, 0, 3]])
def test_a_token_lost_moved_or_doubled_changes_what_follows(changed: list[int]) -> None:
    answer = StageState(SPAN, 7).run(embedded(changed), 0)
    assert next_token(answer) != next_token(StageState(SPAN, 7).run(TEXT, 0))
    assert len(set(true_tokens(100))) > 95


def test_without_failures_the_plain_policies_are_as_fast_as_the_setting_says() -> None:
    restarts = simulate(Policy.RESTARTS, PAPER_SETTING, 128, 0.0, seed=1)
    cache_less = simulate(Policy.CACHE_LESS, PAPER_SETTING, 128, 0.0, seed=1)
    assert 128 / restarts.elapsed_s == pytest.approx(17.1, rel=0.01)
    assert 128 / cache_less.elapsed_s == pytest.approx(3.44, rel=0.01)


@pytest.mark.parametrize("policy", Policy)
def test_every_policy_ends_with_the_true_text_under_failures(policy: Policy) -> None:
    generation = simulate(policy, PAPER_SETTING, 24, 0.03, seed=4)  # compares the text
    assert generation.is_finished
    assert generation.num_failures > 0
    assert generation.num_errors == 0
    assert bool(generation.lost_tries) == (policy is Policy.RESTARTS)
    assert simulate(policy, PAPER_SETTING, 24, 0.03, seed=4) == generation


@pytest.mark.slow
def test_drawn_restarts_take_as_long_as_those_that_are_run() -> None:
    ran = [simulate(Policy.RESTARTS, PAPER_SETTING, 12, 0.02, seed) for seed in range(25)]
    without_failures = simulate(Policy.RESTARTS, PAPER_SETTING, 12, 0.0, seed=1)
    losses = [loss_s for generation in ran for loss_s in losses_s(generation, without_failures)]
    drawn = [draw(without_failures, losses, 0.02, Random(seed)) for seed in range(500)]
    # Texts of 12 tokens start again 2.4 times on average, with as large a deviation: 25 of them give the mean to 20 %.
    assert _mean_s(drawn) == pytest.approx(_mean_s(ran), rel=0.4)


def _mean_s(generations: list[Generation]) -> float:
    return statistics.mean(generation.elapsed_s for generation in generations)


def test_restarts_that_never_end_are_cut_off_after_an_hour() -> None:
    without_failures = Generation(1000, 60.0, True, 0, token_times_s=tuple(0.06 * n for n in range(1, 1001)))
    generation = draw(without_failures, [0.05], 0.01, Random(1))
    assert not generation.is_finished
    assert generation.elapsed_s == 3600.0


def _cells() -> list[Cell]:
    fast = Generation(128, 10.0, True, 2)
    slow = Generation(128, 3600.0, False, 9000)
    return [
        Cell(policy, 128, rate, (slow if policy is Policy.RESTARTS and rate == 0.01 else fast,))
        for policy in Policy
        for rate in RATES
    ]


def test_the_page_shows_shares_the_papers_numbers_and_what_did_not_finish() -> None:
    text = page(_cells(), num_seeds=1)
    assert "| caching with restarts | 12.8 | 12.8 (100%) | 12.8 (100%) | did not finish |" in text
    assert "| *the paper's* |  |  |  | *0.18* |" in text
    assert "| Algorithm 1 | 128 | 0.01 | 12.80 to 12.80 | 2.0 | 0 | 100% |" in text
    assert tables(_cells()) in text


def test_the_chart_has_a_line_for_each_policy() -> None:
    assert chart(_cells()).count("<polyline") == len(Policy)


def test_the_simulation_prints_its_question_its_seeds_and_its_answer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "run_all", lambda lengths, seeds, report: _cells())
    monkeypatch.setattr(sys, "argv", ["run.py", "--quick"])
    run.main()
    printed = capsys.readouterr().out
    assert "What do failing servers cost a text" in printed
    assert "seeds 1" in printed
    assert "## Steps a second, 128 tokens" in printed


@pytest.mark.slow
def test_all_cells_are_there_and_each_is_reported_when_it_is() -> None:
    reported: list[Cell] = []
    assert run_all((4,), (1,), reported.append) == reported
    assert [(cell.policy, cell.failure_rate) for cell in reported] == [
        (policy, rate) for policy in Policy for rate in RATES
    ]


@pytest.mark.slow
def test_algorithm_1_is_ten_times_as_fast_as_restarts_and_finishes_where_they_never_do() -> None:
    assert _speed(128, 0.01) > 10 * 0.18
    assert _speed(1024, 0.001) > 10 * 0.48
    assert _speed(1024, 0.01) > 2.17


def _speed(num_tokens: int, failure_rate: float) -> float:
    """Algorithm 1's, in steps/s."""
    generation = simulate(Policy.ALGORITHM_1, PAPER_SETTING, num_tokens, failure_rate, seed=1)
    assert generation.is_finished
    return num_tokens / generation.elapsed_s
