"""`swarm finetune`: tunes a model of the swarm on rows of a file. What is trained stays here; servers stay frozen.

The rows decide which of transformers' model classes it is: a causal language model, or where they have labels, a
classifier. The loop is a plain PyTorch one (`finetuning/`).
"""

import argparse
import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from p2pswarm.client.config import ClientConfig
from p2pswarm.core.errors import ConfigError, SwarmingError
from p2pswarm.models.auto import (
    AutoDistributedModelForCausalLM,
    AutoDistributedModelForSequenceClassification,
)
from p2pswarm.wire.messages import Codec
from swarm_cli.entrance import entrance
from swarm_cli.finetuning.batches import batches_by_length, steps_per_epoch
from swarm_cli.finetuning.display import Display, display, in_words
from swarm_cli.finetuning.examples import Example, encoding_of, labels_of
from swarm_cli.finetuning.journal import Journal
from swarm_cli.finetuning.loop import Examples, Rhythm, StepReport, run_steps
from swarm_cli.finetuning.options import LEARNING_RATES, TrainingOptions
from swarm_cli.finetuning.rows import Row, check_same_kind, hold_out, read_rows
from swarm_cli.finetuning.stopping import Stopping, stopping
from swarm_cli.finetuning.training import Training, Validation
from swarm_cli.finetuning.training_state import read_state

LABELS_NAME = "labels.json"
"""Beside a classifier's adapter: its labels' names, in the order of its head's rows."""
VALIDATIONS = 10
"""In all, unless told otherwise."""


def run(arguments: argparse.Namespace) -> int:
    """The whole command; its exit status."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    with stopping() as stopper:
        try:
            _finetune(arguments, console, stopper)
        except KeyboardInterrupt:
            return stopper.exit_status
    return 0


def _finetune(arguments: argparse.Namespace, console: Console, stopper: Stopping) -> None:
    output: Path = arguments.output
    saved = read_state(output)
    if saved is not None and not arguments.resume:
        raise ConfigError(f"{output} holds a training already: go on with --resume, or give another --output")
    learned, held_out = _read_data(arguments)
    labels = labels_of(learned)
    with _load(arguments, labels) as model:
        pad_id = _pad_id(model)
        encoding = encoding_of(model.tokenizer, arguments.max_tokens)
        examples = Examples(
            encoding.examples(learned, labels),
            batches_by_length(encoding.examples(held_out, labels), arguments.batch_size, pad_id),
            pad_id,
        )
        options = _options(arguments, str(model.connection.model.model_id), examples.learned)
        head_names = [name for name, _ in model.named_parameters() if not name.startswith("tuning.")]
        training = Training(model, options, head_names)
        if saved is not None:
            options.check_goes_on(saved.options, str(output))
            training.restore(saved)
        console.print(
            f"{len(examples.learned)} rows to learn from, {len(held_out)} held out; "
            f"{training.num_values:,} trained values; steps {training.step} to {options.num_steps}"
        )

        def save() -> None:
            model.save_pretrained(output)
            training.state().save(output)

        journal = Journal(output, training.step)
        if labels:
            (output / LABELS_NAME).write_text(json.dumps(labels))
        with display(console, training.step, options.num_steps) as bar:
            listener = _Both(journal, bar)
            rhythm = Rhythm(arguments.validate_every or max(1, options.num_steps // VALIDATIONS), arguments.save_every)
            try:
                run_steps(training, examples, rhythm, listener=listener, save=save, stopping=stopper)
            except (KeyboardInterrupt, SwarmingError):
                if training.step:
                    console.print(f"step {training.step} is saved in {output}: the same command with --resume goes on")
                raise
        _tell_result(arguments, console, journal, bar.tokens_per_s)


class _Both:
    """Tells the journal and the display."""

    def __init__(self, journal: Journal, bar: Display) -> None:
        self._listeners = (journal, bar)

    def on_step(self, report: StepReport) -> None:
        for listener in self._listeners:
            listener.on_step(report)

    def on_validation(self, step: int, validation: Validation) -> None:
        for listener in self._listeners:
            listener.on_validation(step, validation)


def _read_data(arguments: argparse.Namespace) -> tuple[list[Row], list[Row]]:
    """The rows to learn from, and those held out."""
    rows = read_rows(arguments.data)
    if arguments.validation is None:
        return hold_out(rows, arguments.held_out, arguments.seed)
    held_out = read_rows(arguments.validation)
    check_same_kind([rows[0], *held_out])
    return rows, held_out


def _load(arguments: argparse.Namespace, labels: Sequence[str]) -> Any:
    """transformers' model over the swarm, everything frozen but what the method trains."""
    load = AutoDistributedModelForCausalLM.from_pretrained
    if labels:
        load = AutoDistributedModelForSequenceClassification.from_pretrained
    return load(
        arguments.model,
        peers=arguments.peers,
        identity=entrance(arguments)["identity"],
        swarm_key=arguments.swarm_key,
        dtype=None if arguments.dtype is None else getattr(torch, arguments.dtype),
        revision=arguments.revision,
        token=arguments.token,
        cache_dir=arguments.cache_dir,
        config=ClientConfig(codec=Codec(arguments.compression), local_blocks=arguments.local_blocks),
        tuning_mode=arguments.method,
        pre_seq_len=arguments.prompt_length,
        lora_rank=arguments.rank,
        lora_alpha=2 * arguments.rank,
        target_modules=arguments.target_modules,
        num_labels=len(labels) or None,
        seed=arguments.seed,
    )


def _pad_id(model: Any) -> int:
    """A token to fill up with. A classifier looks for a row's last token that is another one."""
    for token_id in (model.config.pad_token_id, model.tokenizer.pad_token_id, model.tokenizer.eos_token_id):
        if token_id is not None:
            model.config.pad_token_id = token_id
            return int(token_id)
    return 0


def _options(arguments: argparse.Namespace, model_id: str, examples: Sequence[Example]) -> TrainingOptions:
    per_epoch = steps_per_epoch(len(examples), arguments.batch_size)
    options = TrainingOptions(
        model_id=model_id,
        method=arguments.method,
        data=hashlib.sha256(repr(examples).encode()).hexdigest(),
        num_steps=arguments.steps or arguments.epochs * per_epoch,
        batch_size=arguments.batch_size,
        learning_rate=LEARNING_RATES[arguments.method],
        rank=arguments.rank,
        target_modules=arguments.target_modules,
        prompt_length=arguments.prompt_length,
        max_tokens=arguments.max_tokens,
        seed=arguments.seed,
    )
    return options if arguments.learning_rate is None else replace(options, learning_rate=arguments.learning_rate)


def _tell_result(arguments: argparse.Namespace, console: Console, journal: Journal, tokens_per_s: float) -> None:
    validations = [Validation(**entry["validation"]) for entry in journal.entries if "validation" in entry]
    losses = [entry["loss"] for entry in journal.entries if "loss" in entry]
    first, last = validations[0], validations[-1]
    change = last.loss / first.loss - 1
    console.print(f"held-out rows: {in_words(first)} before, {in_words(last)} now: {change:+.0%}")
    console.print(f"saved in {arguments.output}")
    if last.accuracy is None:
        console.print(f"  write with it: swarm generate {arguments.model} PROMPT --adapter {arguments.output}")
    if arguments.json:
        result = {
            "steps": len(losses),
            "loss": losses[-1] if losses else None,
            "validation_before": first.as_json(),
            "validation": last.as_json(),
            "tokens_per_s": round(tokens_per_s, 2),
            "output": str(arguments.output),
        }
        print(json.dumps(result))
