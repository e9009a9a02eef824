"""The KV cache is as large as the operator says, and never larger than what can be used."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pswarm.core.errors import ConfigError
from swarmd.kv_size import (
    MAX_DEFAULT_TOKENS,
    MIN_TOKENS,
    SENSIBLE_TOKENS,
    KVBytes,
    KVShare,
    KVSize,
    KVTokens,
    kv_tokens,
    parse_kv_size,
)

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4GiB", KVBytes(4 * GIB)),
        ("512 MiB", KVBytes(512 * MIB)),
        ("16384", KVTokens(16384)),
        ("16384 tokens", KVTokens(16384)),
        ("16384Tokens", KVTokens(16384)),
        ("25%", KVShare(0.25)),
        ("12.5 %", KVShare(0.125)),
        ("100%", KVShare(1.0)),
    ],
)
def test_a_size_is_bytes_tokens_or_a_share(text: str, size: KVSize) -> None:
    assert parse_kv_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "much", "0", "0 tokens", "-5", "0%", "101%", "nan%", "%", "4 gigs", "0GiB", "1.5"]
)
def test_an_unreadable_size_is_refused_with_what_can_be_said(text: str) -> None:
    with pytest.raises(ConfigError, match=r"kv-cache: wanted an amount of memory .*tokens \(16384\).*share.*, got "):
        parse_kv_size(text)


@pytest.mark.parametrize(
    ("size", "tokens"),
    [
        (KVTokens(5000), 5000),
        (KVBytes(10 * MIB), 10240),
        (KVShare(0.5), GIB // 2 // KIB),
        (None, MAX_DEFAULT_TOKENS),
    ],
)
def test_tokens_follow_from_the_size(size: KVSize | None, tokens: int) -> None:
    assert kv_tokens(size, usable_bytes=GIB, bytes_per_token=KIB) == tokens


def test_the_default_is_a_quarter_or_some_sensible_tokens_if_they_fit() -> None:
    assert kv_tokens(None, usable_bytes=100_000 * KIB, bytes_per_token=KIB) == 25_000
    assert kv_tokens(None, usable_bytes=20_000 * KIB, bytes_per_token=KIB) == SENSIBLE_TOKENS
    assert kv_tokens(None, usable_bytes=5_000 * KIB, bytes_per_token=KIB) == 5_000


@pytest.mark.parametrize(
    ("size", "complaint"),
    [
        (
            KVBytes(2 * GIB),
            r"--kv-cache 2\.0 GiB takes 2\.0 GiB, and 1\.0 GiB can be used beside the weights: .*--kv-cache 512",
        ),
        (KVTokens(600), r"--kv-cache 600 tokens takes 1\.2 GiB"),
        (
            None,
            rf"a KV cache of {MIN_TOKENS} tokens takes 4\.0 GiB, and 1\.0 GiB can .*\(--num-blocks\) or .*512\)",
        ),
        (KVBytes(MIB), r"--kv-cache 1\.0 MiB does not hold a single token, which takes 2\.0 MiB"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_to_do(size: KVSize | None, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        kv_tokens(size, usable_bytes=GIB, bytes_per_token=2 * MIB)


SIZES = st.none() | st.builds(KVBytes, st.integers(1, 1 << 45)) | st.builds(KVTokens, st.integers(1, 1 << 30))


@given(SIZES | st.builds(KVShare, st.floats(0.01, 1.0)), st.integers(0, 1 << 42), st.integers(1, 1 << 24))
def test_no_size_takes_more_than_can_be_used(size: KVSize | None, usable_bytes: int, bytes_per_token: int) -> None:
    try:
        tokens = kv_tokens(size, usable_bytes, bytes_per_token)
    except ConfigError:
        return
    assert tokens >= 1
    assert tokens * bytes_per_token <= usable_bytes
