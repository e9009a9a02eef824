"""Blocks are served, and given up again without a trace in memory: a server that moves has no room for both."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import moving_loader
import pytest
from moving_loader import HIDDEN_SIZE, open_loader

from p2pswarm.testing.tiny_checkpoints import save_tiny_checkpoint
from swarmd import span_loading

MIB = 1 << 20


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


def test_blocks_that_were_given_up_are_out_of_memory(model: Path) -> None:
    """In a process of its own, as a server is: how much of this one is resident, other tests have a part in."""
    command = [sys.executable, moving_loader.__file__, str(model), "4"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    resident_bytes = json.loads(done.stdout)
    for loaded_bytes, left_bytes in resident_bytes:
        assert loaded_bytes - left_bytes > 30 * MIB, f"the blocks take 36 MiB: {resident_bytes}"
    assert resident_bytes[-1][1] - resident_bytes[1][1] < 16 * MIB, resident_bytes


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
