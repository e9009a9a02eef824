"""Which rows `swarm finetune` takes, what it says of others, and what of them is learned."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pswarm.core.errors import ConfigError
from swarm_cli.finetuning.examples import Encoding, Example, labels_of
from swarm_cli.finetuning.rows import LabelledRow, PairRow, TextRow, hold_out, label_names, parse_row, read_rows


def letters(text: str, is_start: bool) -> list[int]:
    """A token a letter, after a first one that says where a text begins."""
    return [*([1] if is_start else []), *map(ord, text)]


ENCODING = Encoding(letters, end_id=2, max_tokens=8)


@pytest.mark.parametrize(
    ("line", "row"),
    [
        (b'{"text": "a b"}', TextRow("f:1", "a b")),
        (b'{"prompt": "", "completion": " b"}', PairRow("f:1", "", " b")),
        (b'{"label": "good", "text": "a"}', LabelledRow("f:1", "a", "good")),
        (b'{"label": 3, "text": "a"}', LabelledRow("f:1", "a", "3")),
        ('{"text": "Grüße 🐟"}'.encode(), TextRow("f:1", "Grüße 🐟")),
    ],
)
def test_row_is_of_one_of_three_kinds(line: bytes, row: object) -> None:
    assert parse_row(line, "f:1") == row


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (b"{", "not JSON: Expecting property name enclosed in double quotes at column 2"),
        (b"[1]", "wanted a JSON object, got [1]"),
        (b'"' + b"a" * 99 + b'"', 'wanted a JSON object, got "aaa'),
        (b"{}", "got an object with nothing"),
        (b'{"text": "a", "lable": "good"}', "got an object with 'text', 'lable'"),
        (b'{"prompt": "a"}', 'wanted {"text": ...}, {"prompt": ..., "completion": ...} or {"text": ..., "label": ...}'),
        (b'{"text": 7}', "'text' is a text, got 7"),
        (b'{"text": null}', "'text' is a text, got null"),
        (b'{"text": "a", "label": 0.5}', "'label' is a text, got 0.5"),
        (b'{"text": " "}', "'text' is empty"),
        (b'{"prompt": "a", "completion": ""}', "'completion' is empty"),
        (b'{"text": "\xff"}', "not UTF-8 at byte 11 of the line"),
        (b'{"text": "\\ud800"}', "'text' holds half of a surrogate pair"),
    ],
)
def test_bad_row_is_named_with_what_is_wrong(line: bytes, complaint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_row(line, "rows.jsonl:7")
    assert str(caught.value).startswith("rows.jsonl:7: ")
    assert complaint in str(caught.value)


@given(st.binary(max_size=60))
def test_any_bytes_are_a_row_or_a_complaint_with_its_place(line: bytes) -> None:
    try:
        place = parse_row(line, "f:9").place
    except ConfigError as error:
        place = str(error).partition(": ")[0]
    assert place == "f:9"


def test_lines_are_counted_with_the_empty_ones(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n\n  \n{"text": "b"}\n')
    assert [row.place for row in read_rows(path)] == [f"{path}:1", f"{path}:4"]
    path.write_text('{"text": "a"}\n\n{"text": }\n')
    with pytest.raises(ConfigError, match=r"rows\.jsonl:3: not JSON"):
        read_rows(path)


def test_files_without_rows_or_of_several_kinds_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with pytest.raises(ConfigError, match=r"rows\.jsonl cannot be read: No such file"):
        read_rows(path)
    path.write_text("\n\n")
    with pytest.raises(ConfigError, match="holds no rows"):
        read_rows(path)
    path.write_text('{"text": "a"}\n{"text": "b", "label": "c"}\n')
    with pytest.raises(ConfigError, match=r":2: a row of text and label among rows that began with a row of text "):
        read_rows(path)


@given(st.integers(2, 50), st.floats(0.01, 0.99), st.integers(0, 5))
def test_held_out_rows_are_others_than_those_learned(num_rows: int, share: float, seed: int) -> None:
    rows = [TextRow(f"f:{number}", "a") for number in range(num_rows)]
    learned, held_out = hold_out(rows, share, seed)
    assert learned
    assert held_out
    assert sorted(learned + held_out, key=rows.index) == rows
    assert hold_out(rows, share, seed) == (learned, held_out)


def test_one_row_cannot_be_both_learned_and_held_out() -> None:
    with pytest.raises(ConfigError, match="--validation"):
        hold_out([TextRow("f:1", "a")], 0.1, 0)


def test_all_of_a_text_is_learned_and_only_the_completion_of_a_pair() -> None:
    rows = [TextRow("f:1", "ab"), PairRow("f:2", "ab", "cd")]
    assert ENCODING.examples(rows, []) == [Example((1, 97, 98, 2)), Example((1, 97, 98, 99, 100, 2), num_given=3)]


def test_long_text_becomes_several_rows_without_losing_a_token() -> None:
    parts = ENCODING.examples([TextRow("f:1", "abcdefghijkl")], [])
    assert [len(part.token_ids) for part in parts] == [8, 6]
    assert sum((part.token_ids for part in parts), ()) == (1, *map(ord, "abcdefghijkl"), 2)


def test_labels_are_numbered_in_their_order() -> None:
    rows = [LabelledRow("f:1", "a", "good"), LabelledRow("f:2", "b", "bad")]
    labels = labels_of(rows)
    assert labels == label_names(rows) == ["bad", "good"]
    assert ENCODING.examples(rows, labels) == [Example((1, 97), label=1), Example((1, 98), label=0)]


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        (PairRow("f:3", "abcd", "efgh"), "f:3: the row has 10 tokens, --max-tokens is 8"),
        (LabelledRow("f:4", "abcdefghi", "bad"), "f:4: the row has 10 tokens, --max-tokens is 8"),
        (LabelledRow("f:5", "a", "new"), "f:5: no row that is learned from has the label 'new'"),
    ],
)
def test_row_that_does_not_fit_is_named(row: PairRow | LabelledRow, complaint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ENCODING.examples([row], ["bad", "good"])
    assert str(caught.value) == complaint


def test_classifier_of_one_label_is_refused() -> None:
    with pytest.raises(ConfigError, match="all rows have the label 'good'"):
        labels_of([LabelledRow("f:1", "a", "good")])
    assert labels_of([TextRow("f:1", "a")]) == []


@pytest.mark.parametrize("name", ["sentiment", "telegrams"])
def test_rows_of_the_tutorials_held_out_are_not_learned(name: str) -> None:
    folder = Path(__file__).parents[2] / "docs" / "data"
    learned, held_out = (
        [json.loads(line) for line in (folder / f"{name}-{part}.jsonl").read_text().splitlines()]
        for part in ("train", "held-out")
    )
    texts = [row.get("text") or row["prompt"] for row in (*learned, *held_out)]
    assert len(set(texts)) == len(texts)
