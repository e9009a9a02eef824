"""Flags and TOML become one config; what cannot work is refused with the name of the setting."""

from pathlib import Path

import pytest

from p2pswarm.checkpoint.adapter_place import AdapterPlace
from p2pswarm.core.errors import ConfigError
from p2pswarm.core.span import Span
from swarmd.config import READERS, NodeConfig, ServerConfig, read_config
from swarmd.kv_size import KVTokens

PEER = "/ip4/192.0.2.7/tcp/4001/p2p/12D3KooWDpJ7As7BWAwRMfu1VU2WCqNjvq387JEYKDBj4kx6nXTN"


def write(folder: Path, text: str) -> Path:
    path = folder / "server.toml"
    path.write_text(text)
    return path


def test_flags_come_as_text_and_are_read_by_setting() -> None:
    config = read_config(
        ServerConfig,
        {"model": "m", "blocks": "0:10", "port": "4001", "peers": [PEER], "grace_period_s": "2.5", "identity": "~/k"},
    )
    assert config.blocks == Span(0, 10)
    assert config.port == 4001
    assert config.peers == (PEER,)
    assert config.grace_period_s == 2.5
    assert config.identity == Path.home() / "k"
    assert config.dtype == "auto"


def test_adapters_have_a_place_and_a_name(tmp_path: Path) -> None:
    path = write(tmp_path, 'adapters = ["somebody/poet", "/a/folder=clerk"]\n')
    config = read_config(ServerConfig, {"model": "m"}, path)
    assert config.adapters == (AdapterPlace("somebody/poet", "poet"), AdapterPlace("/a/folder", "clerk"))
    assert read_config(ServerConfig, {"model": "m", "adapters": ["a/b"]}, path).adapters == (AdapterPlace("a/b", "b"),)


@pytest.mark.parametrize("written", ["kv-cache = 16384", "kv-cache = '16384 tokens'"])
def test_the_file_may_hold_a_size_as_a_number_or_as_text(tmp_path: Path, written: str) -> None:
    path = write(tmp_path, f"{written}\nthroughput = 250\n")
    config = read_config(ServerConfig, {"model": "m"}, path)
    assert config.kv_cache == KVTokens(16384)
    assert config.throughput == 250.0


def test_limits_on_training_are_amounts_of_memory(tmp_path: Path) -> None:
    path = write(tmp_path, "training-memory = '1.5GB'\nmax-tuning = 1048576\n")
    config = read_config(ServerConfig, {"model": "m", "training_memory": "64MiB"}, path)
    assert (config.training_memory, config.max_tuning) == (64 << 20, 1 << 20)
    assert read_config(ServerConfig, {"model": "m"}).training_memory is None


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, 'model = "from-file"\nnum-blocks = 4\ngrace-period = 3\njson = true\n')
    config = read_config(ServerConfig, {"model": "from-flag"}, path)
    assert config == ServerConfig(model="from-flag", num_blocks=4, grace_period_s=3.0, json=True)


def test_an_unknown_key_is_refused_with_its_likely_meaning(tmp_path: Path) -> None:
    path = write(tmp_path, 'model = "m"\nnum-block = 4\n')
    with pytest.raises(
        ConfigError,
        match=r"unknown key 'num-block' \(did you mean 'num-blocks'\?\); known are adapters, .*threads",
    ):
        read_config(ServerConfig, {}, path)


def test_a_bootstrap_node_knows_no_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown key 'model'"):
        read_config(NodeConfig, {}, write(tmp_path, 'model = "m"'))


def test_a_broken_or_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"server\.toml is not TOML"):
        read_config(ServerConfig, {}, write(tmp_path, "model = "))
    with pytest.raises(ConfigError, match=r"cannot read the config file .*nowhere"):
        read_config(ServerConfig, {}, tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ({}, "which model"),
        ({"model": ""}, "model: wanted a folder"),
        ({"model": "m", "blocks": "10"}, "a span is written START:END"),
        ({"model": "m", "blocks": "3:3"}, "0 <= START < END"),
        ({"model": "m", "blocks": "0:3", "num_blocks": "3"}, "--blocks or --num-blocks, not both"),
        ({"model": "m", "num_blocks": "0"}, "num-blocks: wanted a whole number from 1, got 0"),
        ({"model": "m", "num_blocks": "few"}, "num-blocks: wanted a whole number, got 'few'"),
        ({"model": "m", "threads": "-1"}, "threads: wanted a whole number from 1, got -1"),
        ({"model": "m", "kv_cache": "much"}, "kv-cache: wanted an amount of memory .* or a share .*, got 'much'"),
        ({"model": "m", "training_memory": "much"}, "training-memory: wanted an amount of memory .*, got 'much'"),
        ({"model": "m", "max_tuning": "-1"}, "max-tuning: wanted an amount of memory .*, got '-1'"),
        (
            {"model": "m", "throughput": "fast"},
            "throughput: wanted auto, eval, dry-run or tokens per second, got 'fast'",
        ),
        ({"model": "m", "port": "70000"}, "port: wanted a TCP port"),
        ({"model": "m", "dtype": "int8"}, "dtype: wanted one of auto, float32, bfloat16, float16, got 'int8'"),
        ({"model": "m", "grace_period_s": "soon"}, "grace-period: wanted a number, got 'soon'"),
        ({"model": "m", "grace_period_s": "-1"}, "grace-period: wanted seconds from 0"),
        ({"model": "m", "name": "a\nb"}, "name: wanted up to 128 printable letters"),
        ({"model": "m", "peers": ["localhost:4001"]}, "not a multiaddr that can be used here"),
        ({"model": "m", "announce": ["/ip4/0.0.0.0/tcp/4001"]}, "announce: wanted addresses that others can dial"),
        ({"model": "m", "announce": ["/ip4/192.0.2.7/tcp/0"]}, "announce: wanted addresses that others can dial"),
        ({"model": "m", "announce": ["192.0.2.7:4001"]}, "not a multiaddr that can be used here"),
        ({"model": "m", "log_level": "loud"}, "log-level: wanted one of"),
    ],
)
def test_what_cannot_work_is_refused_by_name(flags: dict[str, object], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        read_config(ServerConfig, flags)


@pytest.mark.parametrize(
    "line",
    [
        "port = true",
        'port = "x"',
        "name = 3",
        "json = 1",
        "peers = 'one'",
        "grace-period = true",
        "blocks = 3",
        "kv-cache = true",
    ],
)
def test_the_file_must_hold_values_of_the_right_kind(tmp_path: Path, line: str) -> None:
    with pytest.raises(ConfigError, match=f"{line.split(' ')[0]}: wanted "):
        read_config(ServerConfig, {"model": "m"}, write(tmp_path, line))


def test_every_setting_has_a_reader() -> None:
    assert set(READERS) == set(ServerConfig.__dataclass_fields__)


def test_a_token_is_not_shown() -> None:
    assert "secret" not in repr(ServerConfig(model="m", token="secret"))


def test_how_others_reach_a_node_can_be_told(tmp_path: Path) -> None:
    path = write(tmp_path, 'public-ip = "192.0.2.7"\nno-upnp = true\nno-relay = true\nrelay-rate = "2MiB"\n')
    config = read_config(NodeConfig, {}, path)
    assert (config.public_ip, config.no_upnp, config.no_relay) == ("192.0.2.7", True, True)
    assert config.relay_rate == 2 << 20
    assert read_config(NodeConfig, {}).relay_rate is None


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ({"public_ip": "home.example.org"}, "public-ip: wanted an IP address, got 'home.example.org'"),
        ({"public_ip": "0.0.0.0"}, "public-ip: wanted an IP address"),
        ({"public_ip": "192.0.2.7", "announce": ["/ip4/192.0.2.7/tcp/1"]}, "public-ip: wanted not together"),
        ({"relay_rate": "0"}, "relay-rate: "),
    ],
)
def test_what_cannot_be_where_others_reach_a_node_is_refused(flags: dict[str, object], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        read_config(NodeConfig, flags)
