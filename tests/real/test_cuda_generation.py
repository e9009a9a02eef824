"""Servers on a GPU, client on the CPU: what a whole swarm gives is what the model gives on that GPU."""

from pathlib import Path

import pytest
import torch

from p2pswarm.checkpoint.checkpoint import open_checkpoint
from p2pswarm.checkpoint.local_model import load_local_model
from p2pswarm.client.config import ClientConfig
from p2pswarm.client.portal import Portal
from p2pswarm.core.span import Span
from p2pswarm.models.auto import AutoDistributedModelForCausalLM
from p2pswarm.testing.tiny_checkpoints import save_tiny_checkpoint
from swarm_cli.local_swarm import LocalSwarmPlan, local_swarm

pytestmark = [
    pytest.mark.real,
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

SPANS = (Span(0, 3), Span(3, 4), Span(4, 8))
NEW_TOKENS = 20


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "qwen3_moe", "gpt2"])
@pytest.mark.parametrize("dtype_name", ["float32", "bfloat16"])
def test_three_servers_on_a_gpu_give_the_tokens_of_the_model_on_that_gpu(
    tmp_path: Path, model_type: str, dtype_name: str
) -> None:
    dtype = getattr(torch, dtype_name)
    folder = str(save_tiny_checkpoint(tmp_path / model_type, model_type))
    prompt = torch.arange(3, 35)[None]
    options = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}

    local = load_local_model(open_checkpoint(folder), dtype).to("cuda")
    expected = local.generate(prompt.to("cuda"), **options)[0].tolist()

    with Portal() as portal:
        plan = LocalSwarmPlan(folder, SPANS, threads=1, dtype=dtype_name, device="cuda")
        servers = portal.enter(local_swarm(plan)).value
        config = ClientConfig(known_peers_path=None)
        peers = list(servers[0].addresses)
        with AutoDistributedModelForCausalLM.from_pretrained(folder, peers=peers, config=config) as distributed:
            got = distributed.generate(prompt, **options)[0].tolist()
    assert got == expected
