"""Which model types can be cut into spans? Every type that transformers knows as a causal language model is tried.

Each is made tiny, with random weights and eight blocks, saved, cut into three uneven spans, and compared with the
whole model: prefill, twenty decoded tokens, a left-padded batch, beams, and a rollback. From the repository's root:

    python -m simulations.architectures.run            # all types; writes docs/architectures.md
    python -m simulations.architectures.run llama opt  # these only; prints, writes nothing

Each type is tried in a process forked for it, so that one which hangs or dies is a row of the table like any other.
"""

import argparse
import inspect
import json
import logging
import os
import signal
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from p2pswarm.blocks.architecture import check_config, lay_out
from p2pswarm.blocks.refusals import REFUSALS
from p2pswarm.checkpoint.checkpoint import open_checkpoint
from p2pswarm.checkpoint.local_model import load_local_model
from p2pswarm.core.errors import UnsupportedModelError
from p2pswarm.testing.exactness import measure_exactness
from p2pswarm.testing.tiny_checkpoints import OPTIONS, save_tiny_checkpoint, tiny_config
from simulations.architectures.tiny_options import GUESSES, MORE_OPTIONS

TIME_LIMIT_S = 120
LARGEST_PARAMETERS = 20_000_000
TABLE_PATH = Path("docs/architectures.md")
REASON_CHARACTERS = 220

EXACT, REFUSED, PART, NOT_MADE, FAILS, DIFFERS = "exact", "refused", "part", "not made", "fails", "DIFFERS"
MEANINGS: Mapping[str, str] = {
    EXACT: "three spans give the whole model's tokens, and its logits within 1e-4",
    PART: "made of several parts, or another name; its language model is served, as the type named",
    REFUSED: "refused when it is loaded, for the reason named",
    NOT_MADE: "no tiny model of the type could be made, or it does not run by itself; so it was not tried",
    FAILS: "loads, then fails with an error",
    DIFFERS: "gives wrong answers (never to be seen here)",
}


@dataclass(frozen=True, slots=True)
class Finding:
    model_type: str
    status: str
    note: str = ""


def try_type(model_type: str) -> Finding:
    """Makes the type tiny and compares it in pieces with itself whole."""
    if reason := REFUSALS.get(model_type):
        return Finding(model_type, REFUSED, reason)
    if text_type := language_model_type(model_type):
        return Finding(model_type, PART, text_type)
    guesses = [_known(model_type, guess) for guess in GUESSES]
    tries = [dict(MORE_OPTIONS[model_type])] if model_type in MORE_OPTIONS else guesses
    if model_type in OPTIONS:
        tries = [{}]
    why_not_made = ""
    for options in tries:
        with tempfile.TemporaryDirectory() as folder:
            try:
                check_config(tiny_config(model_type, **options))
                model = lay_out(tiny_config(model_type, **options), torch.float32).model
                if (size := model.num_parameters()) > LARGEST_PARAMETERS:
                    raise ValueError(f"{size} parameters are not tiny")
            except UnsupportedModelError as error:
                return Finding(model_type, REFUSED, str(error))
            except Exception as error:  # noqa: BLE001 - whatever transformers makes of options it was not written for
                why_not_made = why_not_made or _one_line(error)
                continue
            try:
                checkpoint = open_checkpoint(str(save_tiny_checkpoint(Path(folder), model_type, **options)))
                _run_whole(checkpoint)
            except Exception as error:  # noqa: BLE001 - as above: such a model is not one to be tested
                why_not_made = why_not_made or _one_line(error)
                continue
            return compare(model_type, checkpoint)
    return refusal_by_default_config(model_type) or Finding(model_type, NOT_MADE, why_not_made)


def refusal_by_default_config(model_type: str) -> Finding | None:
    """What is said of the type as its authors configure it, for a type that cannot be made tiny."""
    try:
        check_config(CONFIG_MAPPING[model_type]())
    except UnsupportedModelError as error:
        return Finding(model_type, REFUSED, str(error))
    return None


def compare(model_type: str, checkpoint: Any) -> Finding:
    try:
        exactness = measure_exactness(checkpoint)
    except UnsupportedModelError as error:
        return Finding(model_type, REFUSED, str(error))
    except Exception as error:  # noqa: BLE001 - the table says what it was
        return Finding(model_type, FAILS, _one_line(error))
    if exactness.is_exact():
        largest = max(exactness.forward_error, exactness.decode_error, exactness.padded_error)
        return Finding(model_type, EXACT, f"{largest:.0e}")
    return Finding(model_type, DIFFERS, str(exactness))


def language_model_type(model_type: str) -> str | None:
    """The type of the language model within a model of several parts, where it can stand alone."""
    try:
        config = CONFIG_MAPPING[model_type]()
        text_type = str(config.get_text_config(decoder=True).model_type)
    except (ValueError, TypeError, AttributeError):  # some have no defaults
        return None
    return text_type if text_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and text_type != model_type else None


def _known(model_type: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that the type's config has; others could lead transformers' shared code astray."""
    config_class = CONFIG_MAPPING[model_type]
    names = inspect.signature(config_class).parameters.keys() | config_class.attribute_map.keys()
    return {name: value for name, value in options.items() if name in names}


def _run_whole(checkpoint: Any) -> None:
    local: Any = load_local_model(checkpoint)
    local.generate(torch.full((1, 24), 5), max_new_tokens=2, do_sample=False, eos_token_id=None)


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def try_in_a_process(model_type: str) -> Finding:
    """Forks, tries the type there within the time limit, and brings the finding back."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        signal.alarm(TIME_LIMIT_S)
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.dup2(nowhere, sys.stderr.fileno())
        status = 1
        try:
            os.write(writer, json.dumps(asdict(try_type(model_type))).encode())
            status = 0
        finally:
            os._exit(status)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        data = pipe.read()
    _, status = os.waitpid(child, 0)
    if not data:
        died_of = signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else "an error"
        return Finding(model_type, NOT_MADE, f"its process ended by {died_of} (limit {TIME_LIMIT_S} s)")
    return Finding(**json.loads(data))


def with_fate_of_parts(findings: Sequence[Finding]) -> list[Finding]:
    """Models of several parts are served as their language model is, or refused with it."""
    status_of = {finding.model_type: finding.status for finding in findings}
    return [
        Finding(finding.model_type, REFUSED, f"its language model, {finding.note}, is {status_of[finding.note]}")
        if finding.status == PART and status_of.get(finding.note, EXACT) != EXACT
        else finding
        for finding in findings
    ]


def table(findings: Sequence[Finding]) -> str:
    """The page that is published."""
    counts = Counter(finding.status for finding in findings)
    lines = [
        "# Which models can be served",
        "",
        f"Made by `python -m simulations.architectures.run` with transformers {transformers.__version__} and torch "
        f"{torch.__version__.partition('+')[0]}: every model type that transformers maps to a causal language model.",
        "",
        "| | types | meaning |",
        "|---|---:|---|",
        *(f"| {status} | {counts[status]} | {meaning} |" for status, meaning in MEANINGS.items() if counts[status]),
    ]
    for status in MEANINGS:
        group = [finding for finding in findings if finding.status == status]
        if not group:
            continue
        heading = "largest difference of logits" if status == EXACT else "note"
        lines += ["", f"## {status.capitalize()}", "", f"| model type | {heading} |", "|---|---|"]
        lines += [f"| `{finding.model_type}` | {_cell(finding.note)} |" for finding in group]
    return "\n".join(lines) + "\n"


def _cell(note: str) -> str:
    short = note if len(note) <= REASON_CHARACTERS else note[: REASON_CHARACTERS - 3] + "..."
    return short.replace("|", "\\|").replace("<", "&lt;")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("types", nargs="*", help="model types to try (all)")
    chosen = parser.parse_args().types
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    findings = []
    for model_type in chosen or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        finding = try_in_a_process(model_type)
        findings.append(finding)
        print(f"{finding.model_type:28s} {finding.status:9s} {finding.note[:REASON_CHARACTERS]}", flush=True)
    findings = with_fate_of_parts(findings)
    if not chosen:
        TABLE_PATH.write_text(table(findings))
    print(dict(Counter(finding.status for finding in findings)))
    if any(finding.status == DIFFERS for finding in findings):
        sys.exit("a model type runs and gives wrong answers")


if __name__ == "__main__":
    main()
