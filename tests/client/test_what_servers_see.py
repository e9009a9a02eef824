"""All that travels between a client and its servers is read, and searched for the hidden states of the text.

Whatever a client keeps to itself must not be found in it; with no blocks kept, the same search finds the embeddings.
"""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
import trio
from tiny_swarm import TinySwarm

from p2pswarm.client.autograd import BlocksPass
from p2pswarm.client.carried import Carried
from p2pswarm.client.config import ClientConfig
from p2pswarm.client.step_input import StepInput
from p2pswarm.core.span import Span
from p2pswarm.testing.memory_stream import MemoryStream

PROMPT = [5, 17, 99, 3, 42]
FIRST, MIDDLE, LAST = Span(0, 3), Span(3, 4), Span(4, 8)
TWICE = (FIRST, MIDDLE, LAST, FIRST, MIDDLE, LAST)
NUM_BLOCKS = 8
ROUNDING = 1e-4
SEEN_BY_SERVERS = {0: {0, 3, 4, 8}, 1: {1, 3, 4, 7}, 2: {2, 3, 4, 6}}
"""The blocks that hidden states on the wire go into, by how many are kept; 8 is what the last block gives."""


@dataclass
class Wire:
    """Bytes by the stream, each way, that they travelled on."""

    written: dict[MemoryStream, bytearray] = field(default_factory=lambda: defaultdict(bytearray))

    def holds(self, state: torch.Tensor) -> bool:
        """Whether anything on the wire is that vector of float32, but for rounding, wherever it begins."""
        return any(_occurs(state.detach().numpy(), bytes(data)) for data in self.written.values())

    def boundaries(self, states: list[torch.Tensor]) -> set[int]:
        """Those of which any token's hidden state was there; `states`: [tokens, hidden] by boundary."""
        return {number for number, rows in enumerate(states) if any(self.holds(row) for row in rows)}


def _occurs(vector: np.ndarray, data: bytes) -> bool:
    for offset in range(4):
        num_values = max(0, len(data) - offset) // 4
        if num_values >= vector.size:
            values = np.frombuffer(data, np.float32, num_values, offset)
            windows = np.lib.stride_tricks.sliding_window_view(values, vector.size)
            with np.errstate(invalid="ignore", over="ignore"):  # most of what is looked at is no float at all
                begun_alike = windows[np.abs(windows[:, 0] - vector[0]) < ROUNDING]
                if (np.abs(begun_alike - vector) < ROUNDING).all(axis=1).any():
                    return True
    return False


@pytest.fixture
def wire(monkeypatch: pytest.MonkeyPatch) -> Wire:
    wire, write = Wire(), MemoryStream.write

    async def noted(stream: MemoryStream, *buffers: Any) -> None:
        wire.written[stream] += b"".join(buffers)
        await write(stream, *buffers)

    monkeypatch.setattr(MemoryStream, "write", noted)
    return wire


@contextmanager
def noted_states(local: Any) -> Iterator[list[torch.Tensor]]:
    """What enters each block of the local model, and what leaves the last one: [tokens, hidden]."""
    states: list[torch.Tensor] = []
    layers = local.model.layers
    hooks = [layers[0].register_forward_pre_hook(lambda module, inputs: states.append(inputs[0][0]))]
    hooks += [layer.register_forward_hook(lambda module, inputs, output: states.append(output[0])) for layer in layers]
    yield states
    for hook in hooks:
        hook.remove()


@torch.no_grad()
def states_of(local: Any, **inputs: Any) -> list[torch.Tensor]:
    with noted_states(local) as states:
        local(**inputs, use_cache=False)
    assert len(states) == NUM_BLOCKS + 1
    return states


@pytest.mark.parametrize("kept", [0, 1, 2])
async def test_generation_shows_servers_no_state_that_only_kept_blocks_should_see(
    open_world, local, wire: Wire, kept: int
) -> None:
    config = ClientConfig(known_peers_path=None, local_blocks=kept)
    async with open_world(spans=TWICE, config=config) as world, world.model.session(max_length=40) as session:
        tokens = list(PROMPT)
        async for token in session.generate(PROMPT, max_new_tokens=12, do_sample=False):
            tokens.append(token)
            if len(tokens) == 10:
                world.memory.kill(session.route.hops[0].peer_id)  # its stand-in is sent all of the history
        assert session.num_recoveries == 1
    assert tokens[5:] == local.generate(torch.tensor([PROMPT]), max_new_tokens=12, do_sample=False)[0, 5:].tolist()
    ran = torch.tensor([tokens[:-1]])  # the last token is never run
    assert wire.boundaries(states_of(local, input_ids=ran)) == SEEN_BY_SERVERS[kept]


@pytest.mark.parametrize("kept", [0, 2])
async def test_beams_and_turns_show_no_more(open_world, local, wire: Wire, kept: int) -> None:
    config = ClientConfig(known_peers_path=None, local_blocks=kept)
    async with open_world(config=config) as world, world.model.session(max_length=40) as session:
        await session.complete(PROMPT, max_new_tokens=4, num_beams=3, do_sample=False)
        session.position = 0
        first = await session.complete(PROMPT, max_new_tokens=4, do_sample=False)
        session.position = 7
        second = await session.complete([20, 21], max_new_tokens=2, do_sample=False)
    ran = torch.cat([first[:, :7], second], dim=1)[:, :-1]
    for text in (first[:, :-1], ran):
        assert wire.boundaries(states_of(local, input_ids=text)) == SEEN_BY_SERVERS[kept]


@pytest.mark.parametrize("kept", [0, 2])
async def test_training_shows_no_more_and_virtual_tokens_are_kept_too(open_world, local, wire: Wire, kept: int) -> None:
    prefix = torch.randn(2, 64, generator=torch.Generator().manual_seed(4))
    config = ClientConfig(known_peers_path=None, local_blocks=kept)

    def train(world: TinySwarm) -> None:
        embedded = torch.cat([prefix[None], local.get_input_embeddings()(torch.tensor([PROMPT]))], dim=1)
        inputs = embedded.detach().requires_grad_()
        world.model.dispatch.run(BlocksPass(StepInput(inputs, 0))).sum().backward()

    async with open_world(config=config) as world:
        await trio.to_thread.run_sync(train, world)
        world.model.carried = lambda: Carried(prefix)
        token_ids = torch.tensor([PROMPT])
        await trio.to_thread.run_sync(lambda: world.model.shell(token_ids, use_cache=False))
        async with world.model.session(max_length=20) as session:
            await session.complete(PROMPT, max_new_tokens=1)
    embedded = torch.cat([prefix[None], local.get_input_embeddings()(token_ids)], dim=1)
    assert wire.boundaries(states_of(local, inputs_embeds=embedded.detach())) == SEEN_BY_SERVERS[kept]
