"""Fixtures of a tiny swarm, and the same model in this process to compare with; named in `conftest.py` files."""

import functools
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import pytest
from tiny_swarm import TinySwarm, open_tiny_swarm

from p2pswarm.blocks.span_model import load_span
from p2pswarm.checkpoint.checkpoint import Checkpoint, open_checkpoint
from p2pswarm.checkpoint.local_model import load_local_model
from p2pswarm.testing.tiny_checkpoints import save_tiny_checkpoint, save_tiny_tokenizer

OpenWorld = Callable[..., AbstractAsyncContextManager[TinySwarm]]


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = save_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "tiny-llama", "llama", eos_token_id=None)
    save_tiny_tokenizer(folder)
    return open_checkpoint(str(folder))


@pytest.fixture(scope="session")
def local(tiny_llama: Checkpoint) -> Any:
    """The tiny model, all of it in this process."""
    return load_local_model(tiny_llama)


@pytest.fixture(scope="session")
def open_world(tiny_llama: Checkpoint) -> OpenWorld:
    """`async with open_world(spans=..., config=...) as world`. Parts are loaded once: they know of no session."""
    load_part = functools.cache(functools.partial(load_span, tiny_llama))
    return functools.partial(open_tiny_swarm, tiny_llama, load_part)
