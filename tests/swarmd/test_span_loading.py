"""Blocks are served, and given up again without a trace in memory: a server that moves has no room for both."""

import gc
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from p2pswarm.core.ids import PeerId, SessionId
from p2pswarm.core.server_info import ServerInfo, ServerState
from p2pswarm.core.span import Span
from p2pswarm.testing.tiny_checkpoints import save_tiny_checkpoint
from p2pswarm.wire.codecs import encode_tensor
from p2pswarm.wire.messages import InfoReply, OpenSession, Step
from swarmd import span_loading
from swarmd.config import ServerConfig
from swarmd.device_thread import open_device_thread
from swarmd.engine import open_model
from swarmd.kv_size import parse_kv_size
from swarmd.self_description import joining_info
from swarmd.span_loading import ModelLoader

HIDDEN_SIZE = 512
MOVES = (Span(0, 4), Span(4, 8))
MIB = 1 << 20
CLIENT = PeerId("somebody")
NOWHERE: Any = SimpleNamespace(peer_id=PeerId("server"), addresses=())
"""What is asked of a network by who describes a server."""


class AssumedLine:
    """Nothing was measured."""

    bits_per_s = 1e8
    is_known = False


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of 8 blocks of 9 MiB."""
    folder = tmp_path_factory.mktemp("models") / "small"
    return save_tiny_checkpoint(folder, "llama", hidden_size=HIDDEN_SIZE, intermediate_size=3 * HIDDEN_SIZE)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of measured speeds."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def use_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("P2PSWARM_CACHE", str(cache))


@asynccontextmanager
async def open_loader(model: Path) -> AsyncIterator[tuple[ModelLoader, ServerInfo]]:
    config = ServerConfig(model=str(model), threads=1, kv_cache=parse_kv_size("4096"))
    threads_before = torch.get_num_threads()
    opened = open_model(config)

    def describe() -> InfoReply:
        raise AssertionError("nobody asks here")

    info = joining_info(config, NOWHERE, opened, MOVES[0])
    try:
        async with open_device_thread() as device:
            yield ModelLoader(opened, config, device, describe, lambda event, **fields: None, AssumedLine()), info
    finally:
        gc.unfreeze()
        torch.set_num_threads(threads_before)


async def serve_for_a_while(loader: ModelLoader, info: ServerInfo) -> None:
    """Loads the blocks and uses them as clients do."""
    served = await loader.load(info)
    assert served.info.state is ServerState.ONLINE
    assert served.info.throughput_tokens_per_s > 0
    await served.probe()
    request = OpenSession(SessionId("a"), info.model_id, info.span, max_length=100, batch_size=1)
    session = await served.service.open_session(CLIENT, request)
    for step_id, num_tokens in enumerate([20, 1, 1]):
        reply = await session.step(
            Step(step_id, session_length(step_id), encode_tensor(torch.randn(1, num_tokens, HIDDEN_SIZE)))
        )
        assert reply.hidden_states.shape == (1, num_tokens, HIDDEN_SIZE)
    await session.close()


def session_length(step_id: int) -> int:
    return 0 if step_id == 0 else 19 + step_id


@pytest.mark.own_process
async def test_blocks_that_were_given_up_are_out_of_memory(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    process = psutil.Process()
    resident_bytes = []
    async with open_loader(model) as (loader, info):
        for number in range(4):
            await serve_for_a_while(loader, replace(info, span=MOVES[number % 2]))
            loaded_bytes = process.memory_info().rss
            await loader.free()
            resident_bytes.append(process.memory_info().rss)
            assert loaded_bytes - resident_bytes[-1] > 30 * MIB, "the blocks take 36 MiB"
    assert caplog.record_tuples == []
    assert resident_bytes[-1] - resident_bytes[1] < 16 * MIB, resident_bytes


async def test_blocks_that_somebody_holds_on_to_are_told_of(
    model: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(span_loading, "FREE_TRIES", 2)
    async with open_loader(model) as (loader, info):
        served = await loader.load(info)
        await loader.free()
        assert served.info.span == info.span
    assert [(level, text[:40]) for _, level, text in caplog.record_tuples] == [
        (logging.WARNING, "the weights of the blocks served before ")
    ]
