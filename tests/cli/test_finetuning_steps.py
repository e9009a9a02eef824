"""Batches, learning rates, the loop, and that a training which was stopped goes on as if it had not been."""

import itertools
import json
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from p2pswarm.core.errors import CheckpointError, ConfigError, MissingBlocksError
from swarm_cli.finetuning.batches import IGNORED, batches_by_length, examples_of_step, make_batch, steps_per_epoch
from swarm_cli.finetuning.examples import Example
from swarm_cli.finetuning.journal import FILE_NAME as JOURNAL_NAME
from swarm_cli.finetuning.journal import Journal, read_journal
from swarm_cli.finetuning.loop import Examples, Rhythm, StepReport, run_steps
from swarm_cli.finetuning.options import HEAD_RATE_SHARE, TrainingOptions
from swarm_cli.finetuning.stopping import Stopping, stopping
from swarm_cli.finetuning.training import Training, Validation
from swarm_cli.finetuning.training_state import FILE_NAME, read_state

OPTIONS = TrainingOptions("m@0", "lora", "rows", 20, 2, 0.05, 8, None, 16, 512, seed=3)
TEXTS = [Example(tuple((3 * number + index) % 11 for index in range(3 + number))) for number in range(5)]


class SmallModel(nn.Module):
    """Predicts a token from the one before it; a classifier where labels are one a row."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.embeddings = nn.Parameter(torch.randn(11, 6, generator=generator))
        self.score = nn.Parameter(torch.randn(6, 11, generator=generator))
        self.frozen = nn.Parameter(torch.ones(1), requires_grad=False)

    def forward(self, input_ids: Any, attention_mask: Any, labels: Any, use_cache: bool) -> SimpleNamespace:
        logits = self.embeddings[input_ids] @ self.score
        if labels.ndim == 1:
            logits = (logits * attention_mask[:, :, None]).sum(1)[:, :2]
            return SimpleNamespace(logits=logits, loss=nn.functional.cross_entropy(logits, labels))
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
        return SimpleNamespace(logits=logits, loss=loss)


class Recorder:
    """What the loop has told; `at_step` may do something then."""

    def __init__(self, at_step: Any = lambda report: None) -> None:
        self.losses: dict[int, float] = {}
        self.validations: dict[int, float] = {}
        self._at_step = at_step

    def on_step(self, report: StepReport) -> None:
        self.losses[report.step] = report.loss
        self._at_step(report)

    def on_validation(self, step: int, validation: Validation) -> None:
        self.validations[step] = validation.loss


def run(training: Training, folder: Path, recorder: Recorder, stopper: Stopping | None = None, **rhythm: int) -> None:
    examples = Examples(TEXTS, batches_by_length(TEXTS[:3], 2, 0), 0)
    run_steps(
        training,
        examples,
        Rhythm(rhythm.get("validate_every", 5), rhythm.get("save_every", 4)),
        listener=recorder,
        save=lambda: training.state().save(folder),
        stopping=stopper or Stopping(),
    )


@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 3))
def test_every_epoch_takes_each_example_once(num_examples: int, batch_size: int, seed: int) -> None:
    num_steps = steps_per_epoch(num_examples, batch_size)
    for epoch in range(2):
        steps = range(epoch * num_steps, (epoch + 1) * num_steps)
        batches = [examples_of_step(step, num_examples, batch_size, seed) for step in steps]
        assert all(0 < len(batch) <= batch_size for batch in batches)
        assert sorted(itertools.chain.from_iterable(batches)) == list(range(num_examples))


def test_batch_is_filled_up_and_only_what_is_to_be_learned_has_labels() -> None:
    batch = make_batch([Example((5, 6, 7, 8), num_given=2), Example((9, 4))], pad_id=0)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8], [9, 4, 0, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch.labels.tolist() == [[IGNORED, IGNORED, 7, 8], [9, 4, IGNORED, IGNORED]]
    assert (batch.num_tokens, batch.num_learned) == (6, 3)


def test_labels_of_a_classifier_are_one_a_row() -> None:
    batch = make_batch([Example((5, 6), label=1), Example((9,), label=0)], pad_id=0)
    assert batch.labels.tolist() == [1, 0]
    assert batch.num_learned == 2


def test_learning_rate_rises_shortly_and_falls_to_nothing() -> None:
    options = replace(OPTIONS, num_steps=100)
    shares = [options.rate_share(step) for step in range(100)]
    assert max(shares) == shares[5] == 1.0
    assert shares[:6] == sorted(shares[:6])
    assert shares[5:] == sorted(shares[5:], reverse=True)
    assert 0 < shares[-1] < 0.02
    assert 0 < replace(OPTIONS, num_steps=1).rate_share(0) <= 1


def test_only_what_is_trained_changes_and_the_loss_falls(tmp_path: Path) -> None:
    training, recorder = Training(SmallModel(), OPTIONS), Recorder()
    run(training, tmp_path, recorder)
    assert set(training.parameters) == {"embeddings", "score"}
    assert list(recorder.losses) == list(range(1, 21))
    assert list(recorder.validations) == [0, 5, 10, 15, 20]
    assert recorder.validations[20] < recorder.validations[0] - 0.5


def test_head_learns_at_a_share_of_the_rate() -> None:
    training = Training(SmallModel(), OPTIONS, head_names=["score"])
    before = {name: parameter.detach().clone() for name, parameter in training.parameters.items()}
    training.compute_gradients(make_batch(TEXTS[:2], 0))
    training.update()
    moved = {name: (training.parameters[name].detach() - start).abs().max().item() for name, start in before.items()}
    assert moved["score"] == pytest.approx(HEAD_RATE_SHARE * moved["embeddings"], rel=1e-3)


def test_validation_is_the_mean_over_all_that_is_learned() -> None:
    training = Training(SmallModel(), OPTIONS)
    together = training.validate([make_batch(TEXTS, 0)])
    assert training.validate(batches_by_length(TEXTS, 2, 0)).loss == pytest.approx(together.loss, rel=1e-6)
    assert together.accuracy is None


def test_accuracy_is_the_share_of_rows_with_the_right_label() -> None:
    training = Training(SmallModel(), OPTIONS)
    batch = make_batch([Example((3, 4), label=0), Example((5,), label=1), Example((6,), label=0)], 0)
    answers = training.model(**batch.named(), use_cache=False).logits.argmax(-1)
    right = sum(int(answer) == label for answer, label in zip(answers, (0, 1, 0), strict=True))
    assert training.validate([batch]).accuracy == right / 3


@pytest.mark.parametrize("stopped_after", [1, 4, 7, 19])
def test_training_that_was_stopped_goes_on_with_the_losses_of_one_that_was_not(
    tmp_path: Path, stopped_after: int
) -> None:
    whole = Recorder()
    run(Training(SmallModel(), OPTIONS), tmp_path / "whole", whole)

    stopper = Stopping()

    def stop(report: StepReport) -> None:
        if report.step == stopped_after:
            stopper.on_signal(signal.SIGINT)

    before = Recorder(stop)
    with pytest.raises(KeyboardInterrupt):
        run(Training(SmallModel(), OPTIONS), tmp_path / "stopped", before, stopper)
    state = read_state(tmp_path / "stopped")
    assert state is not None
    assert state.step == stopped_after
    again, after = Training(SmallModel(), OPTIONS), Recorder()
    with torch.no_grad():
        again.parameters["score"].zero_()
    again.restore(state)
    run(again, tmp_path / "stopped", after)
    assert before.losses | after.losses == whole.losses
    assert after.validations[20] == whole.validations[20]


def test_signal_in_the_middle_of_a_step_leaves_the_step_out(tmp_path: Path) -> None:
    training, stopper = Training(SmallModel(), OPTIONS), Stopping()
    compute = training.compute_gradients

    def compute_gradients(batch: Any) -> float:
        loss = compute(batch)
        if training.step == 2:
            stopper.on_signal(signal.SIGTERM)
        return loss

    training.compute_gradients = compute_gradients
    with pytest.raises(KeyboardInterrupt):
        run(training, tmp_path, Recorder(), stopper)
    state = read_state(tmp_path)
    assert state is not None
    assert (state.step, stopper.exit_status) == (2, 143)


def test_signal_in_the_middle_of_a_change_waits_until_it_is_whole() -> None:
    stopper, done = Stopping(), []

    def change() -> None:
        with stopper.held():
            stopper.on_signal(signal.SIGINT)
            done.append("all of it")

    with pytest.raises(KeyboardInterrupt):
        change()
    assert done == ["all of it"]


def test_signals_are_those_of_the_program_again_afterwards() -> None:
    before = signal.getsignal(signal.SIGINT)
    with stopping() as stopper:
        assert signal.getsignal(signal.SIGINT) == stopper.on_signal
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
    assert stopper.exit_status == 130


def test_swarm_that_fails_costs_only_the_step_that_was_under_way(tmp_path: Path) -> None:
    training = Training(SmallModel(), OPTIONS)
    compute = training.compute_gradients

    def fail_at_step_6(batch: Any) -> float:
        if training.step == 6:
            raise MissingBlocksError("blocks 3:8 are served by nobody")
        return compute(batch)

    training.compute_gradients = fail_at_step_6
    with pytest.raises(MissingBlocksError):
        run(training, tmp_path, Recorder(), save_every=100)
    state = read_state(tmp_path)
    assert state is not None
    assert state.step == 6


def test_loss_that_is_not_finite_stops_training_with_what_to_do(tmp_path: Path) -> None:
    def break_model(report: StepReport) -> None:
        if report.step == 3:
            training.model.forward = lambda **_: SimpleNamespace(loss=torch.tensor(float("nan")))

    training = Training(SmallModel(), OPTIONS)
    with pytest.raises(ConfigError, match=r"the loss of step 4 is nan: try a smaller --learning-rate than 0\.05"):
        run(training, tmp_path, Recorder(break_model))
    assert training.step == 3


def test_state_is_read_back_as_it_was_and_nothing_else_is_left(tmp_path: Path) -> None:
    training = Training(SmallModel(), OPTIONS)
    for number in range(2):
        training.compute_gradients(make_batch(TEXTS[:2], 0))
        training.update()
        training.state().save(tmp_path)
        state = read_state(tmp_path)
        assert state is not None
        assert (state.step, state.options) == (number + 1, OPTIONS.as_json())
    assert {path.name for path in tmp_path.iterdir()} == {FILE_NAME}
    for name, parameter in training.parameters.items():
        assert torch.equal(state.parameters[name], parameter)
        assert set(state.memory[name]) == {"step", "exp_avg", "exp_avg_sq"}


def test_nothing_saved_is_no_state_and_damage_is_told(tmp_path: Path) -> None:
    assert read_state(tmp_path) is None
    (tmp_path / FILE_NAME).write_bytes(b"half of it")
    with pytest.raises(CheckpointError, match=r"training_state\.safetensors cannot be read: .*; remove it"):
        read_state(tmp_path)


def test_state_of_other_parameters_is_refused(tmp_path: Path) -> None:
    training = Training(SmallModel(), OPTIONS)
    state = training.state()
    with pytest.raises(CheckpointError, match="not those of the 2"):
        training.restore(replace(state, parameters={"embeddings": torch.zeros(2)}))


def test_training_goes_on_only_as_it_began() -> None:
    saved = json.loads(json.dumps(OPTIONS.as_json()))
    OPTIONS.check_goes_on(saved, "out")
    replace(OPTIONS, num_steps=40).check_goes_on(saved, "out")
    with pytest.raises(ConfigError, match=r"out is of another training: batch_size was 2, now 4; seed was 3, now 0\. "):
        replace(OPTIONS, batch_size=4, seed=0).check_goes_on(saved, "out")


def test_journal_forgets_what_comes_again(tmp_path: Path) -> None:
    journal = Journal(tmp_path, last_step=0)
    journal.on_validation(0, Validation(2.0, 0.5))
    for step in (1, 2, 3):
        journal.on_step(StepReport(step, 1.5, 30, 0.25))
    again = Journal(tmp_path, last_step=2)
    assert [entry["step"] for entry in again.entries] == [0, 1, 2]
    assert read_journal(tmp_path / JOURNAL_NAME) == again.entries
    assert again.entries[0] == {"step": 0, "validation": {"loss": 2.0, "accuracy": 0.5}}
    (tmp_path / JOURNAL_NAME).write_text('{"step": 0}\n{')
    with pytest.raises(ConfigError, match="damaged"):
        Journal(tmp_path, last_step=2)
