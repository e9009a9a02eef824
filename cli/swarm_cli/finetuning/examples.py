"""Rows as token ids, and what of them is learned. Whether a row fits is decided here."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, assert_never

from p2pswarm.core.errors import ConfigError
from swarm_cli.finetuning.rows import LabelledRow, PairRow, Row, TextRow, label_names

Encode = Callable[[str, bool], list[int]]
"""A text's token ids; with the tokens that the model wants at a text's beginning, or without."""


@dataclass(frozen=True, slots=True)
class Example:
    """One row of a batch."""

    token_ids: tuple[int, ...]
    num_given: int = 0
    """Tokens at the beginning that are not learned."""
    label: int | None = None
    """Of a classifier, which learns it instead of tokens."""


@dataclass(frozen=True, slots=True)
class Encoding:
    """How a model's rows become tokens."""

    encode: Encode
    end_id: int | None
    """Learned at the end of each text, so that the tuned model knows when it is done; None: the model has none."""
    max_tokens: int

    def examples(self, rows: Sequence[Row], labels: Sequence[str]) -> list[Example]:
        """Long texts become several examples, so there may be more than rows. Raises `ConfigError`."""
        return [example for row in rows for example in self._examples_of(row, labels)]

    def _examples_of(self, row: Row, labels: Sequence[str]) -> list[Example]:
        match row:
            case TextRow():
                token_ids = self._ended(self.encode(row.text, True))
                starts = range(0, len(token_ids), self.max_tokens)
                parts = [tuple(token_ids[start : start + self.max_tokens]) for start in starts]
                return [Example(part) for part in parts if len(part) > 1]
            case PairRow():
                prompt_ids = self.encode(row.prompt, True)
                token_ids = self._ended(prompt_ids + self.encode(row.completion, False))
                self._check_length(row, token_ids)
                if len(token_ids) < 2:
                    raise ConfigError(f"{row.place}: without a prompt, the completion is too short to learn from")
                return [Example(tuple(token_ids), len(prompt_ids))]
            case LabelledRow():
                if row.label not in labels:
                    raise ConfigError(f"{row.place}: no row that is learned from has the label {row.label!r}")
                token_ids = self.encode(row.text, True)
                self._check_length(row, token_ids)
                return [Example(tuple(token_ids), label=labels.index(row.label))]
            case _:
                assert_never(row)

    def _ended(self, token_ids: list[int]) -> list[int]:
        return token_ids if self.end_id is None else [*token_ids, self.end_id]

    def _check_length(self, row: Row, token_ids: Sequence[int]) -> None:
        if not token_ids:
            raise ConfigError(f"{row.place}: the row has no tokens")
        if len(token_ids) > self.max_tokens:
            raise ConfigError(f"{row.place}: the row has {len(token_ids)} tokens, --max-tokens is {self.max_tokens}")


def labels_of(rows: Sequence[Row]) -> list[str]:
    """The labels of a classifier's rows; of other rows, none. Raises `ConfigError` where there is nothing to tell
    apart."""
    labels = label_names([row for row in rows if isinstance(row, LabelledRow)])
    if len(labels) == 1:
        raise ConfigError(f"all rows have the label {labels[0]!r}: there is nothing to tell apart")
    return labels


def encoding_of(tokenizer: Any, max_tokens: int) -> Encoding:
    """By a tokenizer of transformers."""

    def encode(text: str, is_start: bool) -> list[int]:
        token_ids: list[int] = tokenizer(text, add_special_tokens=is_start)["input_ids"]
        return token_ids

    return Encoding(encode, tokenizer.eos_token_id, max_tokens)
