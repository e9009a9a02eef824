"""A server's adapters: counted when it is sized, loaded again with each span it moves to, refused where they fail."""

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_adapters import save_adapter, with_adapter

from p2pswarm.blocks.span_model import load_span
from p2pswarm.checkpoint.adapter_place import AdapterPlace
from p2pswarm.checkpoint.checkpoint import Checkpoint, open_checkpoint
from p2pswarm.checkpoint.local_model import load_local_model
from p2pswarm.core.errors import BadRequest, CheckpointError, ConfigError
from p2pswarm.core.ids import PeerId, SessionId
from p2pswarm.core.server_info import ServerInfo
from p2pswarm.core.span import Span
from p2pswarm.testing.tiny_checkpoints import save_tiny_checkpoint
from p2pswarm.wire.codecs import decode_tensor, encode_tensor
from p2pswarm.wire.messages import Forward, OpenSession, Step
from swarmd import engine
from swarmd.config import ServerConfig
from swarmd.device_thread import open_device_thread
from swarmd.engine import open_model
from swarmd.kv_size import parse_kv_size
from swarmd.self_description import joining_info
from swarmd.sizing import BlockCount
from swarmd.span_loading import ModelLoader

CLIENT = PeerId("somebody")
SPAN, NEXT_SPAN = Span(0, 4), Span(4, 8)


class Anywhere:
    """A network as far as an announcement needs one."""

    peer_id = PeerId("server")
    addresses = ()


class AssumedLine:
    """Nothing was measured."""

    bits_per_s = 1e8
    is_known = False


@pytest.fixture(scope="module")
def local(tiny_checkpoint: Checkpoint) -> Any:
    return load_local_model(tiny_checkpoint)


@pytest.fixture(scope="module")
def poet(local: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(tmp_path_factory.mktemp("adapters") / "poet", local, seed=1)


@pytest.fixture(scope="module")
def merged(local: Any, poet: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The model that peft makes of model and adapter."""
    folder = tmp_path_factory.mktemp("merged")
    with_adapter(local, poet).save_pretrained(folder)
    return open_checkpoint(str(folder))


@pytest.fixture
def config(tiny_checkpoint: Checkpoint, poet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ServerConfig:
    monkeypatch.setenv("P2PSWARM_CACHE", str(tmp_path))
    torch.set_num_threads(1)
    return ServerConfig(
        model=str(tiny_checkpoint._config_folder),
        threads=1,
        kv_cache=parse_kv_size("1024"),
        adapters=(AdapterPlace(str(poet), "poet"),),
    )


async def test_each_span_that_is_served_computes_with_the_adapter(config: ServerConfig, merged: Checkpoint) -> None:
    opened = open_model(config)

    def describe() -> Any:
        raise AssertionError("nobody asks here")

    network: Any = Anywhere()
    async with open_device_thread() as device:
        loader = ModelLoader(opened, config, device, describe, lambda event, **fields: None, AssumedLine())
        for span in (SPAN, NEXT_SPAN):
            info = joining_info(config, network, opened, span)
            assert [adapter.rpartition("@")[0] for adapter in info.adapters] == ["poet"]
            served = await loader.load(info)
            assert served.info.adapters == info.adapters
            await check_answers(served.service, info, load_span(merged, span))
            del served
            await loader.free()
    gc.unfreeze()


async def check_answers(service: Any, info: ServerInfo, reference: Any) -> None:
    """That session and forward pass through the adapter are those of the reference, and others are refused."""
    states = torch.randn(1, 5, 64)
    expected = reference.run(states, None, position=0)
    sent = encode_tensor(states)
    (adapter,) = info.adapters
    request = OpenSession(SessionId("a"), info.model_id, info.span, max_length=8, batch_size=1, adapter=adapter)
    session = await service.open_session(CLIENT, request)
    stepped = await session.step(Step(0, 0, sent))
    await session.close()
    forward = Forward(info.model_id, info.span, sent, adapter=adapter)
    forwarded = await service.forward(CLIENT, forward)
    for reply in (stepped, forwarded):
        torch.testing.assert_close(decode_tensor(reply.hidden_states), expected, rtol=1e-4, atol=1e-4)
    bard = "bard@0123456789abcdef"
    refused = (
        service.open_session(CLIENT, replace(request, adapter=bard)),
        service.forward(CLIENT, replace(forward, adapter=bard)),
    )
    for call in refused:
        with pytest.raises(BadRequest, match=f"this server has the adapters {adapter}, asked was bard@"):
            await call


def test_adapters_take_memory_from_blocks(config: ServerConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def count(config: ServerConfig) -> BlockCount:
        return open_model(config).count_blocks(config.kv_cache)

    plain = count(replace(config, adapters=()))
    assert plain.num_blocks == 8
    rank = 4
    added_bytes = 4 * rank * ((64 + 64) + (64 + 32) + (128 + 64))
    assert count(config).block_bytes == plain.block_bytes + added_bytes
    needed_bytes = 8 * plain.block_bytes + plain.kv_bytes + plain.working_bytes
    monkeypatch.setattr(engine, "spare_share", lambda kind: 0.0)
    monkeypatch.setattr(engine, "free_memory_bytes", lambda device: needed_bytes + 4 * added_bytes)
    assert count(config).num_blocks == 7


def test_the_same_adapter_twice_is_refused(config: ServerConfig) -> None:
    with pytest.raises(ConfigError, match="the same one twice by the same name: poet@"):
        open_model(replace(config, adapters=config.adapters * 2))
    open_model(replace(config, adapters=(*config.adapters, replace(config.adapters[0], name="bard"))))


def test_an_adapter_of_another_model_is_refused_before_anything_is_loaded(config: ServerConfig, tmp_path: Path) -> None:
    folder = save_tiny_checkpoint(tmp_path / "wide", "llama", intermediate_size=192)
    with pytest.raises(CheckpointError, match=r"poet@.*down_proj.lora_A.weight has the shape \[4, 128\]"):
        open_model(replace(config, model=str(folder)))
