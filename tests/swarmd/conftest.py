"""A tiny model, and some of its blocks as a server holds them."""

import pytest
import torch

from p2pswarm.blocks.span_model import SpanModel, load_span
from p2pswarm.checkpoint.checkpoint import Checkpoint, open_checkpoint
from p2pswarm.core.span import Span
from p2pswarm.testing.tiny_checkpoints import save_tiny_checkpoint


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A llama of 8 blocks, hidden size 64."""
    return open_checkpoint(str(save_tiny_checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny", "llama")))


@pytest.fixture(scope="session")
def tiny_span(tiny_checkpoint: Checkpoint) -> SpanModel:
    """Its blocks 2:6."""
    torch.set_num_threads(1)
    return load_span(tiny_checkpoint, Span(2, 6))
