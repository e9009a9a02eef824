"""What a server puts off importing changes nothing it computes, and is there when it is needed."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from p2pswarm.blocks.span_model import load_span
from p2pswarm.checkpoint.checkpoint import open_checkpoint
from p2pswarm.core.span import Span
from p2pswarm.testing.tiny_checkpoints import save_tiny_checkpoint

pytestmark = pytest.mark.real

MODEL_TYPES = ("llama", "gemma2", "bloom", "mixtral", "gpt_oss", "deepseek_v3")
SERVER = """
import sys
from swarmd.quick_import import STAND_INS, StandIn, import_transformers, quick_start

answers = {}
with quick_start():
    import_transformers()
    import torch
    from p2pswarm.blocks.span_model import load_span
    from p2pswarm.checkpoint.checkpoint import open_checkpoint
    from p2pswarm.core.span import Span

    assert all(isinstance(sys.modules[name], StandIn) for name in STAND_INS)
    given = torch.load(sys.argv[1], weights_only=True)
    for folder in sys.argv[3:]:
        model = load_span(open_checkpoint(folder), Span(2, 6))
        answers[folder] = model.run(given["hidden_states"], None, position=0, attention_mask=given["mask"])
torch.save(answers, sys.argv[2])
assert not any(isinstance(module, StandIn) for module in sys.modules.values())
assert torch._dynamo.is_compiling() is False
assert "torch._dynamo.symbolic_convert" in sys.modules
"""


def test_models_loaded_the_quick_way_compute_the_same(tmp_path: Path) -> None:
    folders = [str(save_tiny_checkpoint(tmp_path / model_type, model_type)) for model_type in MODEL_TYPES]
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[1, :3] = False
    given = {"hidden_states": torch.randn(2, 12, 64), "mask": mask}
    torch.save(given, tmp_path / "given.pt")
    subprocess.run(
        [sys.executable, "-c", SERVER, str(tmp_path / "given.pt"), str(tmp_path / "answers.pt"), *folders], check=True
    )
    answers = torch.load(tmp_path / "answers.pt", weights_only=True)
    for folder in folders:
        model = load_span(open_checkpoint(folder), Span(2, 6))
        expected = model.run(given["hidden_states"], None, position=0, attention_mask=mask)
        torch.testing.assert_close(answers[folder][mask], expected[mask])
