"""What the benchmarks make of the times and tokens they have got."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import trio
from trio.testing import MockClock

from p2pswarm.client.step_input import StepInput
from p2pswarm.core.errors import ConfigError
from swarm_cli.arguments import parse_arguments
from swarm_cli.bench import chosen_measurement
from swarm_cli.benchmarks.clients import Decoded
from swarm_cli.benchmarks.generating import Measured, make_prompt
from swarm_cli.benchmarks.greedy import GreedyPeer, GreedyReport
from swarm_cli.benchmarks.many_clients import ManyClientsReport, RoundOfClients, StartTogether, client_prompt, summarize
from swarm_cli.benchmarks.offload import OffloadedModel, OffloadReport
from swarm_cli.benchmarks.one_client import OneClientReport
from swarm_cli.benchmarks.stall import Arrivals, Gaps, StalledRound, quiet_gaps_s, stalled_gaps_s
from swarm_cli.benchmarks.training import Pass
from swarm_cli.benchmarks.training import summarize as summarize_training


@pytest.mark.parametrize(
    ("flags", "file"),
    [
        ([], "one_client"),
        (["--clients", "1,2"], "many_clients"),
        (["--stall"], "stall"),
        (["--greedy"], "greedy"),
        (["--greedy", "backward"], "greedy"),
        (["--training", "--batch", "2x16"], "training"),
        (["--baseline", "offload"], "offload"),
    ],
)
def test_flags_choose_the_measurement(flags: list[str], file: str) -> None:
    assert chosen_measurement(parse_arguments(["bench", *flags])) == file


def test_one_client_is_held_against_the_local_model() -> None:
    printed = OneClientReport(20.0, 18.0, 1.0, 1.1, 1.25, True, 5, 512).as_json()
    assert (printed["decode_ratio"], printed["first_token_ratio"], printed["is_exact"]) == (0.9, 1.1, True)


def test_clients_have_different_prompts_of_different_lengths() -> None:
    prompts = [client_prompt(number) for number in range(16)]
    assert len({len(prompt) for prompt in prompts}) == 16
    assert len({tuple(prompt[:8]) for prompt in prompts}) == 16
    assert make_prompt(4) == [20, 21, 22, 23]


def test_tokens_together_are_counted_while_all_clients_decode() -> None:
    fast = Decoded([1, 2, 3], [11.0, 12.0])
    slow = Decoded([4, 5, 6], [11.5, 14.0])
    together = summarize([fast, slow], started_at_s=10.0)
    assert together.tokens_per_s == 3 / 2.0
    assert together.tokens_per_s_of_each == (1.0, 0.5)
    assert together.token_ids == ((1, 2, 3), (4, 5, 6))


def test_report_names_each_client_whose_tokens_are_not_the_local_models() -> None:
    local = (Measured((1, 2), 0.1, 0.05), Measured((3, 4), 0.1, 0.05))
    alone = RoundOfClients(20.0, (20.0,), ((1, 2),))
    two = RoundOfClients(30.0, (16.0, 14.0), ((1, 2), (3, 9)))
    report = ManyClientsReport({1: [alone], 2: [two]}, local, are_processes=False)
    printed = report.as_json()["clients"]
    assert [entry["over_one_client"] for entry in printed] == [1.0, 1.5]
    assert [entry["are_exact"] for entry in printed] == [[True], [True, False]]
    assert printed[1]["slowest_client_tokens_per_s"] == 14.0
    assert report.as_json()["local_tokens_per_s"] == 20.0


async def test_nobody_starts_before_all_are_ready(autojump_clock) -> None:
    start, began_s = StartTogether(3), []

    async def client(ready_after_s: float) -> None:
        await trio.sleep(ready_after_s)
        await start.wait()
        began_s.append(trio.current_time())

    begin_s = trio.current_time()
    async with trio.open_nursery() as nursery:
        for ready_after_s in (1.0, 5.0, 2.0):
            nursery.start_soon(client, ready_after_s)
    assert [at_s - begin_s for at_s in began_s] == [5.0, 5.0, 5.0]


def test_gap_that_outlasts_the_prompt_counts_as_stalled() -> None:
    came_at_s = [0.0, 0.1, 0.2, 0.3, 1.0, 1.5, 2.0, 9.0, 9.5]
    one = StalledRound(came_at_s, list(range(9)), prefill_began_s=2.5, prefill_ended_s=8.0, prefill_token_id=0)
    assert quiet_gaps_s(one) == [0.5, 0.5]
    assert stalled_gaps_s(one) == [7.0]


def test_gaps_are_told_by_median_p95_and_longest() -> None:
    gaps = Gaps(tuple(map(float, range(1, 101))))
    assert (gaps.median_s, gaps.p95_s, gaps.max_s) == (50.5, 95.0, 100.0)


async def test_arrivals_can_be_waited_for_until_they_end(autojump_clock) -> None:
    times = Arrivals()

    async def decode() -> None:
        for token_id in range(3):
            await trio.sleep(1)
            times.note(token_id)
        await trio.sleep(1)
        times.end()

    begin_s = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(decode)
        await times.until(2)
        assert trio.current_time() - begin_s == 2.0
        await times.until(9)
    assert trio.current_time() - begin_s == 4.0


def test_share_that_a_greedy_peer_leaves_is_stated() -> None:
    assert GreedyReport(20.0, 12.0, 300.0, 2, True, 5).as_json()["share_kept"] == 0.6


class CountedTraining:
    """Counts batches on their way there, and back; each takes a second."""

    def __init__(self) -> None:
        self.num_there = self.num_back = 0

    async def forward(self, batch: StepInput, *, keeps_trail: bool) -> tuple[torch.Tensor, bool]:
        await trio.sleep(1)
        self.num_there += 1
        return batch.hidden_states, keeps_trail

    async def backward(self, trail: bool, grad_outputs: torch.Tensor) -> None:
        assert trail
        await trio.sleep(1)
        self.num_back += 1


@pytest.mark.parametrize(("trains", "num_there", "num_back"), [(False, 24, 0), (True, 12, 12)])
async def test_a_greedy_peer_sends_batches_there_and_where_it_trains_back(
    trains: bool, num_there: int, num_back: int, autojump_clock: MockClock
) -> None:
    training = CountedTraining()
    model: Any = SimpleNamespace(
        dispatch=SimpleNamespace(forward_pass=SimpleNamespace(training=training)),
        servers=SimpleNamespace(facts=SimpleNamespace(hidden_size=8)),
        shell=SimpleNamespace(dtype=torch.float32),
    )
    greedy = GreedyPeer(model, trains=trains)
    with trio.move_on_after(6.5):
        async with greedy.at_work():
            await trio.sleep_forever()
    assert (training.num_there, training.num_back) == (num_there, num_back)


def test_swarm_is_held_against_offloading() -> None:
    assert OffloadReport(16.0, 1.6, 17.0, 425_000_000, 425e6, True, 5).as_json()["swarm_over_offload"] == 10.0


def test_offloading_that_does_not_read_the_disk_is_refused() -> None:
    model = OffloadedModel.__new__(OffloadedModel)
    model.blocks_bytes, model._num_tokens, model._read_bytes = 1000, 10, 5000
    with pytest.raises(ConfigError, match="TMPDIR"):
        model.check_reads()


def test_training_is_held_against_the_local_model_by_medians() -> None:
    gradients = torch.ones(2, 5, 3)
    locally = [Pass(forward_s, 4.0, 2.5, gradients) for forward_s in (1.0, 2.0, 9.0)]
    in_swarm = [Pass(2.5, 5.0, 2.5, gradients * share) for share in (1.0, 1.00001, 1.0)]
    report = summarize_training(in_swarm, locally, "float32")
    printed = report.as_json()
    assert (printed["batch"], printed["rounds"]) == ([2, 5], 3)
    assert (printed["forward_ratio"], printed["forward_backward_ratio"]) == (0.8, 0.8)
    assert (printed["local_forward_tokens_per_s"], printed["swarm_forward_backward_tokens_per_s"]) == (5.0, 2.0)
    assert printed["are_equal"] is True
    assert printed["gradient_difference"] == pytest.approx(1e-5, rel=0.01)
    assert report.as_table().row_count == 2


def test_training_with_other_gradients_than_the_local_models_is_told() -> None:
    one, other = (Pass(1.0, 1.0, 2.5, torch.full((1, 2, 3), value)) for value in (1.0, 1.001))
    assert summarize_training([one], [other], "float32").are_equal is False
    assert summarize_training([one], [other], "bfloat16").are_equal is True
