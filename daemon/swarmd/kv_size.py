"""How much memory the KV cache may take, as an operator says it (`--kv-cache`), and how many tokens that is. Pure."""

from dataclasses import dataclass
from typing import assert_never

from p2pswarm.core.byte_sizes import EXAMPLES, format_byte_size, parse_byte_size
from p2pswarm.core.errors import ConfigError

WANTED = f"an amount of memory ({EXAMPLES}), a number of tokens (16384) or a share of what is free (25%)"

DEFAULT_SHARE = 0.25
"""Of what can be used once the weights are loaded: passes, and other servers, need the rest."""
SENSIBLE_TOKENS = 8192
"""Four short chats or one long one at a time: taken beyond the share where it is there."""
MIN_TOKENS = 2048
"""One chat: less is no use to anybody, unless asked for."""
MAX_DEFAULT_TOKENS = 1 << 17
"""128 Ki: 16 sessions of 8 Ki tokens. Small models would otherwise announce more than any one device can decode."""


@dataclass(frozen=True, slots=True)
class KVBytes:
    num_bytes: int

    def __str__(self) -> str:
        return format_byte_size(self.num_bytes)


@dataclass(frozen=True, slots=True)
class KVTokens:
    num_tokens: int

    def __str__(self) -> str:
        return f"{self.num_tokens} tokens"


@dataclass(frozen=True, slots=True)
class KVShare:
    """Of what can be used once the weights are loaded."""

    share: float

    def __str__(self) -> str:
        return f"{100 * self.share:g}%"


KVSize = KVBytes | KVTokens | KVShare


def parse_kv_size(text: str) -> KVSize:
    """`4GiB`, `16384`, `16384 tokens` or `25%`. Raises `ConfigError`."""
    stripped = text.strip().lower()
    digits = stripped.removesuffix("tokens").rstrip()
    if digits.isdecimal():
        size: KVSize = KVTokens(int(digits))
        is_fine = int(digits) > 0
    elif stripped.endswith("%"):
        size = KVShare(_number(stripped.removesuffix("%"), text) / 100)
        is_fine = 0 < size.share <= 1
    else:
        size = KVBytes(_bytes(text))
        is_fine = size.num_bytes > 0
    if not is_fine:
        raise _unreadable(text)
    return size


def kv_tokens(size: KVSize | None, usable_bytes: int, bytes_per_token: int) -> int:
    """How many tokens of KV cache to offer where so many bytes can be used once the weights are loaded.

    `size` None: as many as seem sensible. Raises `ConfigError` where that is more than that, or of no use.
    """
    fitting = usable_bytes // max(bytes_per_token, 1)
    match size:
        case None:
            tokens = default_kv_tokens(fitting)
        case KVTokens(num_tokens):
            tokens = num_tokens
        case KVBytes(num_bytes):
            tokens = num_bytes // max(bytes_per_token, 1)
        case KVShare(share):
            tokens = int(fitting * share)
        case _:
            assert_never(size)
    if tokens > fitting:
        asked = f"--kv-cache {size}" if size is not None else f"a KV cache of {tokens} tokens"
        raise ConfigError(
            f"{asked} takes {format_byte_size(tokens * bytes_per_token)}, and {format_byte_size(usable_bytes)} can be "
            f"used beside the weights: {_advice(fitting)}"
        )
    if tokens < 1:
        raise ConfigError(
            f"--kv-cache {size} does not hold a single token, which takes {format_byte_size(bytes_per_token)}"
        )
    return tokens


def default_kv_tokens(fitting_tokens: int) -> int:
    """What to offer where so many fit: a part, or more of little; at least one chat, whether it fits or not."""
    share = int(fitting_tokens * DEFAULT_SHARE)
    return max(MIN_TOKENS, min(max(share, SENSIBLE_TOKENS), fitting_tokens, MAX_DEFAULT_TOKENS))


def _advice(fitting_tokens: int) -> str:
    fewer = "serve fewer blocks (--num-blocks)"
    return f"{fewer} or offer less (--kv-cache {fitting_tokens})" if fitting_tokens > 0 else fewer


def _number(digits: str, text: str) -> float:
    try:
        return float(digits)
    except ValueError as error:
        raise _unreadable(text) from error


def _bytes(text: str) -> int:
    try:
        return parse_byte_size(text)
    except ConfigError as error:
        raise _unreadable(text) from error


def _unreadable(text: str) -> ConfigError:
    return ConfigError(f"kv-cache: wanted {WANTED}, got {text!r}")
