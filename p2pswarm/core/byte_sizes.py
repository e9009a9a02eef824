"""Amounts of memory as people write and read them: `4GiB` is 2^32 bytes, `1.5 GB` is 1,500,000,000."""

import re

from p2pswarm.core.errors import ConfigError

UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 1 << 10,
    "mib": 1 << 20,
    "gib": 1 << 30,
    "tib": 1 << 40,
}
"""By lower-case name."""
EXAMPLES = "4GiB, 512MiB or 1.5GB"

_SIZE = re.compile(r"\s*(?P<number>\d+(\.\d+)?)\s*(?P<unit>[A-Za-z]*)\s*", re.ASCII)


def parse_byte_size(text: str) -> int:
    """The number of bytes; raises `ConfigError` for what is no amount of memory."""
    match = _SIZE.fullmatch(text)
    unit = UNITS.get(match["unit"].lower()) if match else None
    if match is None or unit is None or ("." in match["number"] and unit == 1):
        raise ConfigError(f"wanted an amount of memory such as {EXAMPLES}, got {text!r}")
    return int(float(match["number"]) * unit) if "." in match["number"] else int(match["number"]) * unit


def format_byte_size(num_bytes: float) -> str:
    """Three digits or so in the unit that suits: `3.1 GiB`, `512 MiB`, `17 B`."""
    for unit, name in ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if num_bytes >= unit:
            amount = num_bytes / unit
            return f"{amount:.1f} {name}" if amount < 10 else f"{amount:.0f} {name}"
    return f"{num_bytes:.0f} B"
