"""Blocks in the swarm are a torch module: slices, single blocks, iteration; gradients are those of local blocks."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tiny_swarm import TinySwarm, open_tiny_swarm
from tiny_training import (
    NUM_BLOCKS,
    TUNED_PATHS,
    Gradients,
    LocalBlocks,
    left_padding,
    random_states,
    random_tuning,
)

from p2pswarm.blocks.span_model import load_span
from p2pswarm.checkpoint.checkpoint import open_checkpoint
from p2pswarm.checkpoint.local_model import load_local_model
from p2pswarm.client.config import ClientConfig
from p2pswarm.client.portal import Portal
from p2pswarm.client.tuning import Tuning
from p2pswarm.core.errors import ConfigError
from p2pswarm.core.span import Span
from p2pswarm.models.distributed_causal_lm import distributed
from p2pswarm.models.distributed_shell import Connection
from p2pswarm.models.remote_sequential import RemoteSequential
from p2pswarm.testing.tiny_checkpoints import save_tiny_checkpoint

ROWS, TOKENS = 6, 5
STATES, WEIGHTS = random_states(ROWS, TOKENS, seed=1), random_states(ROWS, TOKENS, seed=2)


@dataclass(frozen=True)
class Family:
    """A tiny model in three servers, in sub-batches of two rows; and the same one here."""

    model: Any
    world: TinySwarm
    local: LocalBlocks
    tuning: Tuning

    @property
    def blocks(self) -> RemoteSequential:
        blocks: RemoteSequential = self.model.remote_blocks
        return blocks


@pytest.fixture(scope="module", params=["llama", "gpt2", "gemma2", "bloom"])
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Family]:
    torch.set_num_threads(1)
    name = request.param
    checkpoint = open_checkpoint(str(save_tiny_checkpoint(tmp_path_factory.mktemp(name) / "tiny", name)))
    local = load_local_model(checkpoint)
    tuning = random_tuning(local, checkpoint, paths=TUNED_PATHS[name])
    config = ClientConfig(known_peers_path=None, max_training_tokens=2 * TOKENS)
    with Portal() as portal:
        load_part = functools.partial(load_span, checkpoint)
        world = portal.enter(open_tiny_swarm(checkpoint, load_part, config=config, call=portal.call)).value
        model = distributed(world.model.shell, Connection(portal, None, world.model))  # type: ignore[arg-type]
        yield Family(model, world, LocalBlocks(checkpoint, local), tuning)


def remote_gradients(blocks: RemoteSequential, tuning: Tuning | None = None, **options: Any) -> Gradients:
    inputs = STATES.clone().requires_grad_()
    leaves = [tensor.clone().requires_grad_() for tensor in (tuning.tensors if tuning is not None else ())]
    output = blocks(inputs, tuning=None if tuning is None else tuning.with_tensors(leaves), **options)
    (output * WEIGHTS).sum().backward()
    found = [leaf.grad for leaf in [inputs, *leaves]]
    return Gradients(output.detach(), found[0], tuple(found[1:]))


def assert_close(got: Gradients, expected: Gradients) -> None:
    pairs = [(got.output, expected.output), (got.inputs, expected.inputs)]
    for one, other in [*pairs, *zip(got.tuning, expected.tuning, strict=True)]:
        assert (one - other).norm() <= 1e-4 * other.norm()


def test_gradients_of_inputs_prompts_and_low_rank_pairs_are_the_local_ones(family: Family) -> None:
    assert_close(remote_gradients(family.blocks), family.local.gradients(STATES, WEIGHTS))
    got = remote_gradients(family.blocks, family.tuning)
    assert_close(got, family.local.gradients(STATES, WEIGHTS, family.tuning))
    assert all(gradient.norm() > 0 for gradient in got.tuning)


def test_gradients_of_padded_rows_are_the_local_ones(family: Family) -> None:
    mask = left_padding(ROWS, TOKENS)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    got = remote_gradients(family.blocks, family.tuning, attention_mask=mask.long(), position_ids=positions)
    expected = family.local.gradients(STATES, WEIGHTS, family.tuning, mask=mask, position_ids=positions)
    real = mask[..., None]
    assert_close(
        Gradients(got.output * real, got.inputs, got.tuning),
        Gradients(expected.output * real, expected.inputs, expected.tuning),
    )


def test_slices_and_single_blocks_compute_their_part(family: Family) -> None:
    blocks = family.blocks
    with torch.no_grad():
        whole = family.local(STATES)
        torch.testing.assert_close(blocks[5:](blocks[:5](STATES)), whole, rtol=1e-4, atol=1e-5)
        states = STATES
        for block in blocks:
            states = block(states)
        torch.testing.assert_close(states, whole, rtol=1e-4, atol=1e-5)
    part = family.local.gradients(STATES, WEIGHTS, blocks=Span(2, 6))
    assert_close(remote_gradients(blocks[2:6]), part)
    assert_close(remote_gradients(blocks[1:7][1:-1]), part)


def test_a_slice_gives_no_gradient_to_what_tunes_other_blocks(family: Family) -> None:
    leaves = [tensor.clone().requires_grad_() for tensor in family.tuning.tensors]
    tuning = family.tuning.with_tensors(leaves)
    family.blocks[2:4](STATES, tuning=tuning).sum().backward()
    for (block, _), pair in tuning.layers.items():
        assert pair.up.grad is not None
        assert bool(pair.up.grad.norm() > 0) is (2 <= block < 4)
    assert tuning.prompts is not None
    assert tuning.prompts.grad is not None
    assert [bool(row.norm() > 0) for row in tuning.prompts.grad] == [block in (2, 3) for block in range(NUM_BLOCKS)]


def test_it_can_be_counted_indexed_and_named(family: Family) -> None:
    blocks = family.blocks
    assert len(blocks) == NUM_BLOCKS
    assert [block.span for block in blocks[4:]] == [Span(4, 5), Span(5, 6), Span(6, 7), Span(7, 8)]
    assert blocks[-1].span == Span(7, 8)
    assert list(blocks.parameters()) == []
    assert f"blocks 1:3 of {family.world.model.model_id}" in repr(blocks[1:3])
    for number in (8, -9):
        with pytest.raises(IndexError, match=f"there are 8 blocks here, asked was number {number}"):
            blocks[number]
    for wrong in (slice(0, 8, 2), slice(5, 5), slice(6, 2)):
        with pytest.raises(ConfigError, match="blocks holds some that follow one another"):
            blocks[wrong]
