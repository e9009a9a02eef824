"""A server's statistics from outside its process: events, the page for Prometheus, and the answer to a client."""

import json
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import trio

from p2pswarm.core.ids import ModelId, PeerId
from p2pswarm.core.server_load import ServerLoad
from p2pswarm.core.span import Span
from p2pswarm.net.host import open_network
from p2pswarm.net.identity import Identity
from p2pswarm.rpc.client import RpcClient
from p2pswarm.testing.tiny_checkpoints import save_tiny_checkpoint
from p2pswarm.wire.codecs import encode_tensor
from p2pswarm.wire.messages import Forward

pytestmark = pytest.mark.real

TIMEOUT_S = 60.0
ROWS, TOKENS = 3, 5


def command(folder: Path, *flags: str) -> list[str]:
    model = save_tiny_checkpoint(folder / "tiny", "llama")
    common = ["--host", "127.0.0.1", "--identity", str(folder / "key"), "--threads", "1", "--blocks", "0:8", "--json"]
    return [sys.executable, "-m", "swarmd", "start", str(model), *common, *flags]


def events_of(process: subprocess.Popen[str]) -> Iterator[dict[str, Any]]:
    assert process.stdout is not None
    return (json.loads(line) for line in process.stdout)


def next_event(events: Iterator[dict[str, Any]], name: str) -> dict[str, Any]:
    return next(event for event in events if event["event"] == name)


async def forward_once(ready: dict[str, Any]) -> tuple[ServerLoad | None, int]:
    """What the server says of itself after one forward pass, and the bytes that the client has sent."""
    async with open_network(Identity.generate()) as network:
        peer_id = await network.connect(ready["addresses"][0])
        rpc = RpcClient(network)
        hidden_states = encode_tensor(torch.zeros(ROWS, TOKENS, 64))
        await rpc.forward(peer_id, Forward(ModelId(ready["model_id"]), Span(0, 8), hidden_states), TIMEOUT_S)
        reply = await rpc.info(PeerId(ready["peer_id"]), TIMEOUT_S)
        rpc.close()
        return reply.load, network.traffic.sent_bytes


def test_events_page_and_answer_tell_the_same(tmp_path: Path) -> None:
    flags = ["--metrics", "0", "--stats-period", "0.5"]
    with subprocess.Popen(command(tmp_path, *flags), stdout=subprocess.PIPE, text=True) as process:
        try:
            events = events_of(process)
            url = next_event(events, "metrics")["url"]
            ready = next_event(events, "ready")
            load, sent_bytes = trio.run(forward_once, ready)
            with urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer:
                page = answer.read().decode()
            told = next(event for event in events if event["event"] == "statistics" and event["received_bytes"] > 3840)
        finally:
            process.kill()
    assert load is not None
    assert (load.num_sessions, load.num_errors, load.num_moves) == (0, 0, 0)
    assert load.cache_tokens_total == told["cache_tokens_total"] == ready["cache_tokens"]
    assert ROWS * TOKENS * 64 * 4 < load.received_bytes <= sent_bytes
    assert told["num_tokens"]["forward"] == ROWS * TOKENS
    assert 'swarmd_tokens_total{kind="forward"} 15.0' in page
    assert url.startswith("http://127.0.0.1:")


def test_metrics_port_that_is_taken_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = subprocess.run(
            command(tmp_path, "--metrics", str(port)), capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
    assert done.returncode == 1
    assert f"metrics: cannot listen on 127.0.0.1:{port}" in done.stderr
    assert "Traceback" not in done.stderr
