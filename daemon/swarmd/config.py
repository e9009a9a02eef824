"""What a node is told by its operator: command-line flags and a TOML file become one frozen config, checked once, here.

A key of the TOML file is the flag's name without its dashes. Flags win over the file; a key that is not known is
refused. `swarmd/__main__.py` declares the flags and their help, `docs/reference-swarmd.md` tells what each is for.
"""

import difflib
import ipaddress
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from p2pswarm.checkpoint.adapter_place import AdapterPlace
from p2pswarm.core.byte_sizes import parse_byte_size
from p2pswarm.core.errors import ConfigError
from p2pswarm.core.quantization import Quantization
from p2pswarm.core.span import Span
from p2pswarm.net.addresses import parse_tcp_address, split_peer_address
from p2pswarm.net.private.invitation import accept_invitations
from swarmd.http_address import HttpAddress
from swarmd.kv_size import KVSize, parse_kv_size
from swarmd.throughput import ThroughputSetting, ThroughputSource, parse_throughput
from swarmd.tuning_memory import DEFAULT_MAX_BYTES

LOG_LEVELS = ("debug", "info", "warning", "error")
DTYPES = ("auto", "float32", "bfloat16", "float16")
MAX_PORT = 65535
MAX_ADAPTERS = 64
MAX_NAME_LETTERS = 128
"""What an announcement may carry (`wire/server_info.py`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeConfig:
    """What every node needs: where to listen, who it is, whom to ask."""

    peers: tuple[str, ...] = ()
    """Nodes of the swarm to join, as multiaddrs or invitations; empty starts a new swarm."""
    host: str | None = None
    """IP address to listen on; None: every interface, IPv4 and IPv6."""
    port: int = 0
    """TCP port to listen on; 0: any free one."""
    announce: tuple[str, ...] = ()
    """Multiaddrs, without a peer id, that others are told to dial; empty: found out by asking them."""
    public_ip: str | None = None
    """IP address at which others reach the port that is listened on; None: found out by asking them."""
    no_upnp: bool = False
    """Whether the router is never asked to forward a port."""
    no_relay: bool = False
    """Whether others are never reached through this node."""
    relay_rate: int | None = None
    """Bytes a second that go through this node for others; None: a sensible part of a home line."""
    identity: Path | None = None
    """File of the node's key; None: the first one in the user's data folder that no other node is using."""
    swarm_key: Path | None = None
    """File of the key of a private swarm; None: the public one, or that of an invitation."""
    members: Path | None = None
    """File of the private swarm's members, signed by its owner; None: what other nodes say."""
    json: bool = False
    """Whether lifecycle events go to stdout as JSON, one a line."""
    stop_with_stdin: bool = False
    """Whether the end of stdin means stop, for programs that start servers."""
    log_level: str = "warning"

    def __post_init__(self) -> None:
        for address in self.peer_addresses:
            split_peer_address(address)
        for address in self.announce:
            is_dialable = parse_tcp_address(address).is_dialable
            _check(is_dialable, "announce", "addresses that others can dial (no wildcard, no port 0)", address)
        if self.public_ip is not None:
            _check(not self.announce, "public_ip", "not together with --announce, which says more", self.public_ip)
            _check(_is_ip_address(self.public_ip), "public_ip", "an IP address", self.public_ip)
        _check(self.relay_rate is None or self.relay_rate > 0, "relay_rate", "bytes a second above 0", self.relay_rate)
        _check(0 <= self.port <= MAX_PORT, "port", f"a TCP port from 0 (any free one) to {MAX_PORT}", self.port)
        _check(self.log_level in LOG_LEVELS, "log_level", f"one of {', '.join(LOG_LEVELS)}", self.log_level)

    @property
    def peer_addresses(self) -> tuple[str, ...]:
        """The multiaddrs among the peers, those in invitations included."""
        return accept_invitations(self.peers, None)[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig(NodeConfig):
    """What a server of model blocks needs."""

    model: str
    """Folder, hub id or `.gguf` file."""
    blocks: Span | None = None
    num_blocks: int | None = None
    """How many blocks to serve, where the swarm needs them most; with `blocks` None too: as many as fit."""
    dtype: str = "auto"
    quant: Quantization | None = None
    """How weights are held; None: nf4 on CUDA, not quantized elsewhere."""
    adapters: tuple[AdapterPlace, ...] = ()
    """LoRA adapters that sessions may ask for."""
    device: str = "auto"
    threads: int | None = None
    """Of torch; None: one per physical core."""
    name: str = ""
    """Shown to people beside the peer id."""
    revision: str | None = None
    token: str | None = field(default=None, repr=False)
    """For gated models of the hub."""
    cache_dir: Path | None = None
    max_disk_space: int | None = None
    """Bytes of weights that the cache may hold; None: whatever the disk has, but for the last GiB."""
    max_length: int | None = None
    """Longest session accepted, in tokens; None: what the model was made for, if the KV cache holds it."""
    kv_cache: KVSize | None = None
    """KV cache for all sessions together; None: a sensible part of the free memory."""
    training_memory: int | None = None
    """Bytes that gradients may take while they are computed; None: what a row of a sensible length takes."""
    max_tuning: int = DEFAULT_MAX_BYTES
    """Bytes of what a client brings along with one call or session; there is room for four of these in all."""
    throughput: ThroughputSetting = ThroughputSource.AUTO
    grace_period_s: float = 10.0
    """How long running sessions may go on once the server was asked to stop, or goes on to other blocks."""
    balance_quality: float = 0.75
    """A server that was not told its blocks moves where the swarm's throughput is below this part of what it would be
    then; 0: never."""
    balance_check_period_s: float = 30.0
    """Between two looks whether to move, on average."""
    stats_period_s: float = 0.0
    """Between two `statistics` events; 0: none."""
    metrics: HttpAddress | None = None
    """Where Prometheus may ask for statistics; None: nowhere."""

    def __post_init__(self) -> None:
        NodeConfig.__post_init__(self)
        _check(bool(self.model), "model", "a folder, a hub id or a .gguf file", self.model)
        if self.blocks is not None and self.num_blocks is not None:
            raise ConfigError(f"give --blocks or --num-blocks, not both (got {self.blocks} and {self.num_blocks})")
        _check(len(self.adapters) <= MAX_ADAPTERS, "adapters", f"at most {MAX_ADAPTERS}", len(self.adapters))
        for name in ("num_blocks", "threads", "max_length"):
            value = getattr(self, name)
            _check(value is None or value >= 1, name, "a whole number from 1", value)
        _check(self.dtype in DTYPES, "dtype", f"one of {', '.join(DTYPES)}", self.dtype)
        _check(0 <= self.grace_period_s < float("inf"), "grace_period_s", "seconds from 0", self.grace_period_s)
        _check(0 <= self.balance_quality <= 1, "balance_quality", "a part from 0 to 1", self.balance_quality)
        period_s = self.balance_check_period_s
        _check(0 < period_s < float("inf"), "balance_check_period_s", "seconds above 0", period_s)
        _check(0 <= self.stats_period_s < float("inf"), "stats_period_s", "seconds from 0", self.stats_period_s)
        _check(
            len(self.name) <= MAX_NAME_LETTERS and self.name.isprintable(),
            "name",
            f"up to {MAX_NAME_LETTERS} printable letters",
            self.name,
        )


def _check(is_fine: bool, name: str, wanted: str, got: object) -> None:
    if not is_fine:
        raise ConfigError(f"{_key(name)}: wanted {wanted}, got {got!r}")


def _is_ip_address(text: str) -> bool:
    try:
        return not ipaddress.ip_address(text).is_unspecified
    except ValueError:
        return False


def _key(name: str) -> str:
    """How the operator writes a setting."""
    return name.removesuffix("_s").replace("_", "-")


Config = TypeVar("Config", bound=NodeConfig)


def read_config(kind: type[Config], flags: Mapping[str, object], path: Path | None = None) -> Config:
    """The config of `kind` from the flags that were given, on top of those in the TOML file at `path`."""
    settings: dict[str, object] = {} if path is None else _read_toml(kind, path)
    settings |= flags
    if kind is ServerConfig and "model" not in settings:
        raise ConfigError("which model? Give a folder, a hub id or a .gguf file (or `model` in the --config file)")
    return kind(**{name: READERS[name](name, value) for name, value in settings.items()})


def _read_toml(kind: type[NodeConfig], path: Path) -> dict[str, object]:
    try:
        with path.open("rb") as file:
            written = tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"cannot read the config file {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"the config file {path} is not TOML: {error}") from error
    known = {_key(setting.name): setting.name for setting in fields(kind)}
    for key in written:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise ConfigError(f"{path}: unknown key {key!r}{hint}; known are {', '.join(sorted(known))}")
    return {known[key]: value for key, value in written.items()}


def _text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise _wrong_kind(name, "text", value)
    return value


def _adapters(name: str, value: object) -> tuple[AdapterPlace, ...]:
    return tuple(AdapterPlace.parse(text) for text in _texts(name, value))


def _whole_number(name: str, value: object) -> int:
    if isinstance(value, str) and value.strip().lstrip("-").isdecimal():
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise _wrong_kind(name, "a whole number", value)
    return value


def _number(name: str, value: object) -> float:
    try:
        if isinstance(value, str | int | float) and not isinstance(value, bool):
            return float(value)
    except ValueError:
        pass
    raise _wrong_kind(name, "a number", value)


def _truth(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise _wrong_kind(name, "true or false", value)
    return value


def _texts(name: str, value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise _wrong_kind(name, "a list of texts", value)
    return tuple(value)


def _path(name: str, value: object) -> Path:
    return Path(_text(name, value)).expanduser()


def _span(name: str, value: object) -> Span:
    return Span.parse(_text(name, value))


def _quantization(name: str, value: object) -> Quantization:
    kinds = [kind.value for kind in Quantization]
    if value not in kinds:
        raise _wrong_kind(name, f"one of {', '.join(kinds)}", value)
    return Quantization(value)


def _kv_size(name: str, value: object) -> KVSize:
    return parse_kv_size(_text_or_number(name, value))


def _byte_size(name: str, value: object) -> int:
    try:
        return parse_byte_size(_text_or_number(name, value))
    except ConfigError as error:
        raise ConfigError(f"{_key(name)}: {error}") from error


def _throughput(name: str, value: object) -> ThroughputSetting:
    return parse_throughput(_text_or_number(name, value))


def _text_or_number(name: str, value: object) -> str:
    """What TOML may hold as a number, and a flag as text."""
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else _text(name, value)


def _http_address(name: str, value: object) -> HttpAddress:
    return HttpAddress.parse(str(value) if type(value) is int else _text(name, value))


def _wrong_kind(name: str, wanted: str, value: object) -> ConfigError:
    return ConfigError(f"{_key(name)}: wanted {wanted}, got {value!r}")


READERS: Mapping[str, Callable[[str, object], Any]] = {
    "peers": _texts,
    "host": _text,
    "port": _whole_number,
    "announce": _texts,
    "public_ip": _text,
    "no_upnp": _truth,
    "no_relay": _truth,
    "relay_rate": _byte_size,
    "identity": _path,
    "swarm_key": _path,
    "members": _path,
    "json": _truth,
    "stop_with_stdin": _truth,
    "log_level": _text,
    "model": _text,
    "blocks": _span,
    "num_blocks": _whole_number,
    "dtype": _text,
    "quant": _quantization,
    "adapters": _adapters,
    "device": _text,
    "threads": _whole_number,
    "name": _text,
    "revision": _text,
    "token": _text,
    "cache_dir": _path,
    "max_disk_space": _byte_size,
    "max_length": _whole_number,
    "kv_cache": _kv_size,
    "training_memory": _byte_size,
    "max_tuning": _byte_size,
    "throughput": _throughput,
    "grace_period_s": _number,
    "stats_period_s": _number,
    "metrics": _http_address,
    "balance_quality": _number,
    "balance_check_period_s": _number,
}
"""How a setting's value is read, from a flag (text, a list of texts, or True) or from TOML (anything)."""
