import json
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from p2pswarm.checkpoint.safetensors_header import LENGTH, header_size, make_header, parse_header
from p2pswarm.core.errors import CheckpointError

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool)

tensors_by_name = st.dictionaries(
    st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=12),
    st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=3)).map(
        lambda kind: torch.arange(int(torch.Size(kind[1]).numel())).reshape(kind[1]).to(kind[0])
    ),
    max_size=6,
)


@given(tensors=tensors_by_name)
@settings(deadline=None)
def test_every_file_of_the_safetensors_package_is_read(tensors: dict[str, torch.Tensor]) -> None:
    content = save(tensors)
    header = content[: header_size(content[:8], len(content), "x")]

    places = parse_header(header, len(content), "x")

    assert {place.name: place.shape for place in places} == {name: tuple(t.shape) for name, t in tensors.items()}
    assert all(place.size_bytes == tensors[place.name].nbytes for place in places)


@given(tensors=tensors_by_name, data=st.data())
@settings(deadline=None)
def test_some_tensors_with_a_new_header_are_a_file_of_the_package(
    tensors: dict[str, torch.Tensor], data: st.DataObject
) -> None:
    content = save(tensors)
    places = parse_header(content[: header_size(content[:8], len(content), "x")], len(content), "x")
    chosen = data.draw(st.lists(st.sampled_from(places), unique_by=lambda place: place.name) if places else st.just([]))

    got = load(make_header(chosen) + b"".join(content[place.start : place.end] for place in chosen))

    assert got.keys() == {place.name for place in chosen}
    assert all(torch.equal(got[name], tensors[name]) and got[name].dtype == tensors[name].dtype for name in got)


def header_of(entries: object) -> bytes:
    text = json.dumps(entries).encode()
    return LENGTH.pack(len(text)) + text


def entry(start: object, end: object) -> dict[str, object]:
    return {"dtype": "U8", "shape": [4], "data_offsets": [start, end]}


@pytest.mark.parametrize(
    ("entries", "file_bytes_after_header", "complaint"),
    [
        ({"a": entry(0, 4)}, 5, "its header tells of"),
        ({"a": entry(0, 4)}, 3, "its header tells of"),
        ({"a": entry(0, 4), "b": entry(5, 8)}, 8, r"b lies at .*, expected from"),
        ({"a": entry(0, 4), "b": entry(2, 6)}, 6, r"b lies at .*, expected from"),
        ({"a": entry(4, 0)}, 4, r"a lies at"),
        ({"a": entry(-4, 4)}, 4, "damaged header"),
        ({"a": entry("0", 4)}, 4, "damaged header"),
        ({"a": {"dtype": "U8"}}, 4, "damaged header"),
        ({"a": {**entry(0, 4), "shape": [[4]]}}, 4, "damaged header"),
        ({"a": 5}, 4, "damaged header"),
        ([], 0, "damaged header"),
    ],
)
def test_a_header_that_does_not_account_for_its_file_is_refused(
    entries: object, file_bytes_after_header: int, complaint: str
) -> None:
    header = header_of(entries)

    with pytest.raises(CheckpointError, match=rf"model\.safetensors .*{complaint}"):
        parse_header(header, len(header) + file_bytes_after_header, "model.safetensors")


@pytest.mark.parametrize("first_bytes", [b"", b"1234567", LENGTH.pack(93), LENGTH.pack(1 << 60)])
def test_a_length_that_cannot_be_is_refused(first_bytes: bytes) -> None:
    with pytest.raises(CheckpointError, match="no safetensors file"):
        header_size(first_bytes, 100, "x")


@given(junk=st.binary(max_size=200))
@settings(deadline=None)
def test_junk_raises_nothing_but_checkpoint_errors(junk: bytes) -> None:
    with suppress(CheckpointError):
        parse_header(junk[: header_size(junk[:8], len(junk), "x")], len(junk), "x")


def test_a_header_nested_without_end_is_refused() -> None:
    text = b"[" * 100_000

    with pytest.raises(CheckpointError, match="damaged header"):
        parse_header(LENGTH.pack(len(text)) + text, LENGTH.size + len(text), "x")


def test_metadata_is_no_tensor(tmp_path: Path) -> None:
    content = save({"a": torch.zeros(2)}, metadata={"format": "pt"})

    (place,) = parse_header(content[: header_size(content[:8], len(content), "x")], len(content), "x")

    assert place.name == "a"
