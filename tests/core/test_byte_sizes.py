"""Amounts of memory are read as written, or refused with an example."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pswarm.core.byte_sizes import format_byte_size, parse_byte_size
from p2pswarm.core.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("4GiB", 4 << 30),
        ("4 gib", 4 << 30),
        (" 1.5GB ", 1_500_000_000),
        ("0.5MiB", 1 << 19),
        ("123", 123),
        ("123 B", 123),
        ("9007199254740993KiB", 9007199254740993 << 10),
    ],
)
def test_an_amount_of_memory_is_read(text: str, num_bytes: int) -> None:
    assert parse_byte_size(text) == num_bytes


@pytest.mark.parametrize(
    "text", ["", "GiB", "4 gigs", "-1GiB", "1e3", "1.GiB", "4GiB more", "٤GiB", "nan", "4G", "1.5", "1.5B"]
)
def test_what_is_no_amount_of_memory_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"wanted an amount of memory such as 4GiB, 512MiB or 1\.5GB, got "):
        parse_byte_size(text)


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1 << 30, "1.0 GiB"), (3.14 * 2**30, "3.1 GiB"), (512 << 20, "512 MiB")],
)
def test_an_amount_of_memory_is_written(num_bytes: float, text: str) -> None:
    assert format_byte_size(num_bytes) == text


@given(st.integers(0, 1 << 50))
def test_what_is_written_can_be_read(num_bytes: int) -> None:
    assert parse_byte_size(format_byte_size(num_bytes)) == pytest.approx(num_bytes, rel=0.051)
