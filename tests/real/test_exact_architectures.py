"""Seventeen architectures, each in three uneven spans behind real sockets, give the local model's logits and tokens."""

from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import trio
from tiny_swarm import FixedView, client_model, serving

from p2pswarm.blocks.span_model import load_span
from p2pswarm.checkpoint.checkpoint import open_checkpoint
from p2pswarm.checkpoint.local_model import load_local_model
from p2pswarm.client.config import ClientConfig
from p2pswarm.core.span import Span
from p2pswarm.net.host import open_network
from p2pswarm.net.identity import Identity
from p2pswarm.testing.tiny_checkpoints import OPTIONS, SLIDING_WINDOW, save_tiny_checkpoint

pytestmark = pytest.mark.real

SPANS = (Span(0, 2), Span(2, 3), Span(3, 8))
PROMPTS = torch.randint(3, 128, (2, SLIDING_WINDOW + 5), generator=torch.Generator().manual_seed(11))
DECODE: dict[str, Any] = {
    "do_sample": False,
    "max_new_tokens": 20,
    "min_new_tokens": 20,
    "return_dict_in_generate": True,
    "output_logits": True,
}


@pytest.mark.parametrize("model_type", sorted(OPTIONS))
async def test_prefill_and_twenty_tokens_are_the_local_models(model_type: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(save_tiny_checkpoint(tmp_path / model_type, model_type)))
    local: Any = load_local_model(checkpoint)
    expected = await trio.to_thread.run_sync(partial(local.generate, PROMPTS, **DECODE))
    async with AsyncExitStack() as stack:
        view = FixedView()
        for span in SPANS:
            network = await stack.enter_async_context(
                open_network(Identity.generate(), listen=["/ip4/127.0.0.1/tcp/0"])
            )
            part = load_span(checkpoint, span)
            info, _ = await stack.enter_async_context(serving(network, checkpoint, part))
            view.servers[network.peer_id] = info
        network = await stack.enter_async_context(open_network(Identity.generate()))
        config = ClientConfig(known_peers_path=None)
        model = client_model(checkpoint, network, view, config, trio.from_thread.run)
        async with model.session(max_length=64) as session:
            got = await session.complete(PROMPTS, **DECODE)
            assert [hop.span for hop in session.route.hops] == list(SPANS)
    assert got.sequences.tolist() == expected.sequences.tolist()
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(expected.logits), rtol=0, atol=1e-4)
