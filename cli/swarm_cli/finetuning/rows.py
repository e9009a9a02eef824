"""The rows that a model is tuned on: a JSON object a line, of one of three kinds, each line checked where it is read.

Knows nothing of tokens; `examples.py` makes them.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from p2pswarm.core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class TextRow:
    """`{"text": ...}`: every token is learned."""

    place: str
    """File and line, for messages."""
    text: str


@dataclass(frozen=True, slots=True)
class PairRow:
    """`{"prompt": ..., "completion": ...}`: only the completion is learned."""

    place: str
    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class LabelledRow:
    """`{"text": ..., "label": ...}`: for a classifier."""

    place: str
    text: str
    label: str


Row = TextRow | PairRow | LabelledRow

KINDS: dict[frozenset[str], type[TextRow] | type[PairRow] | type[LabelledRow]] = {
    frozenset({"text"}): TextRow,
    frozenset({"prompt", "completion"}): PairRow,
    frozenset({"text", "label"}): LabelledRow,
}
WANTED = '{"text": ...}, {"prompt": ..., "completion": ...} or {"text": ..., "label": ...}'


def read_rows(path: Path) -> list[Row]:
    """All rows of a file; empty lines count for nothing. Raises `ConfigError` with file and line of what is wrong."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from error
    rows = [parse_row(line, f"{path}:{number}") for number, line in enumerate(lines, start=1) if line.strip()]
    if not rows:
        raise ConfigError(f"{path} holds no rows")
    check_same_kind(rows)
    return rows


def check_same_kind(rows: Sequence[Row]) -> None:
    """Raises `ConfigError` where a row is of another kind than the first."""
    for row in rows:
        if type(row) is not type(rows[0]):
            raise ConfigError(
                f"{row.place}: a {_name(row)} among rows that began with a {_name(rows[0])} ({rows[0].place})"
            )


def parse_row(line: bytes, place: str) -> Row:
    """One line's row. Raises `ConfigError`, which begins with the place."""
    try:
        fields: Any = json.loads(line)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{place}: not UTF-8 at byte {error.start + 1} of the line") from error
    except json.JSONDecodeError as error:
        raise ConfigError(f"{place}: not JSON: {error.msg} at column {error.colno}") from error
    if not isinstance(fields, dict):
        raise ConfigError(f"{place}: wanted a JSON object, got {_in_words(fields)}")
    kind = KINDS.get(frozenset(fields))
    if kind is None:
        names = ", ".join(map(repr, fields)) or "nothing"
        raise ConfigError(f"{place}: wanted {WANTED}, got an object with {names}")
    if kind is LabelledRow and isinstance(fields["label"], int):
        fields["label"] = str(fields["label"])
    for name, value in fields.items():
        if not isinstance(value, str):
            raise ConfigError(f"{place}: {name!r} is a text, got {_in_words(value)}")
        if not value.strip() and name != "prompt":
            raise ConfigError(f"{place}: {name!r} is empty")
        if not _is_unicode(value):
            raise ConfigError(f"{place}: {name!r} holds half of a surrogate pair, which is no character")
    return kind(place, **fields)


def hold_out(rows: Sequence[Row], share: float, seed: int) -> tuple[list[Row], list[Row]]:
    """The rows to learn from, and that share of them, drawn by the seed, which is not learned. At least one of each.

    Raises `ConfigError` where there are too few rows.
    """
    if len(rows) < 2:
        raise ConfigError(f"of {len(rows)} row none can be held out; give other rows with --validation")
    order = list(rows)
    random.Random(seed).shuffle(order)
    num_held_out = min(len(rows) - 1, max(1, round(share * len(rows))))
    return order[num_held_out:], order[:num_held_out]


def label_names(rows: Sequence[LabelledRow]) -> list[str]:
    """In order: a label's index is what the classifier learns."""
    return sorted({row.label for row in rows})


def _name(row: Row) -> str:
    fields = next(fields for fields, kind in KINDS.items() if isinstance(row, kind))
    return "row of " + " and ".join(sorted(fields, reverse=True))


def _in_words(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:40]} …"


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
