import subprocess
import sys
from pathlib import Path

import pytest

from p2pswarm.testing.tiny_checkpoints import save_tiny_checkpoint

PROGRAM = """
import sys
from p2pswarm.blocks.light_imports import import_transformers_lightly
import_transformers_lightly()
import torch
from p2pswarm.blocks.client_model import SwarmCache, load_client_model
from p2pswarm.blocks.span_model import load_span
from p2pswarm.checkpoint.checkpoint import open_checkpoint
from p2pswarm.core.span import Span
from p2pswarm.testing.exactness import SpanChain
checkpoint = open_checkpoint(sys.argv[1])
model = load_client_model(checkpoint, SpanChain([load_span(checkpoint, Span(0, 8))]))
prompt = torch.arange(3, 12)[None]
load_span(checkpoint, Span(0, 1)).run_backward(torch.zeros(1, 3, 64), torch.zeros(1, 3, 64))
text = model.generate(prompt, past_key_values=SwarmCache(), max_new_tokens=5, eos_token_id=None)
assert text.shape == (1, 14)
heavy = {"sympy", "torch._dynamo", "torch._inductor", "torch.distributed.tensor", "scipy.optimize"} & sys.modules.keys()
assert not heavy, heavy
from transformers.loss.loss_for_object_detection import linear_sum_assignment
assert [line.tolist() for line in linear_sum_assignment([[4, 1], [2, 3]])] == [[0, 1], [1, 0]]
assert "scipy.optimize" in sys.modules
assert torch.distributed.is_available()
assert torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1)).item() == 2
assert "torch._dynamo" in sys.modules
"""


@pytest.mark.slow
def test_a_model_runs_without_compiler_and_optimizers_which_stay_there_for_who_wants_them(tmp_path: Path) -> None:
    folder = save_tiny_checkpoint(tmp_path, "llama")

    finished = subprocess.run([sys.executable, "-c", PROGRAM, str(folder)], capture_output=True, text=True, check=False)

    assert finished.returncode == 0, finished.stderr
