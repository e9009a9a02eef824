"""Every family that a release is tested with gives the local model's answers from three uneven spans."""

from pathlib import Path

import pytest
import torch

from p2pswarm.checkpoint.checkpoint import open_checkpoint
from p2pswarm.testing.exactness import Exactness, measure_exactness
from p2pswarm.testing.tiny_checkpoints import OPTIONS, save_tiny_checkpoint

SUMMATION_ERROR = 5e-5
"""Of logits near 1: a span adds a single token's products up in another order (`packed_weights.py`)."""


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("model_type", OPTIONS)
def test_three_spans_give_the_local_model_s_answers(model_type: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(save_tiny_checkpoint(tmp_path, model_type)))

    exactness = measure_exactness(checkpoint)

    assert exactness == Exactness(
        forward_error=pytest.approx(0, abs=1e-6),
        decode_error=pytest.approx(0, abs=SUMMATION_ERROR),
        padded_error=pytest.approx(0, abs=SUMMATION_ERROR),
        same_tokens=True,
        same_padded_tokens=True,
        same_beams=True,
        same_after_rollback=True,
    )


def test_a_block_run_twice_shows(tmp_path: Path) -> None:
    """That the comparison can fail at all: the last span overlaps the one before it."""
    from p2pswarm.core.span import Span

    checkpoint = open_checkpoint(str(save_tiny_checkpoint(tmp_path, "llama")))

    exactness = measure_exactness(checkpoint, [Span(0, 4), Span(3, 8)])

    assert exactness.decode_error > 0.1
    assert not exactness.is_exact()
