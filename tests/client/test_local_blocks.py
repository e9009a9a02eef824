"""Blocks that the client keeps change no answer: prompts, padding, beams, going back, lost servers, gradients."""

from functools import partial
from typing import Any

import pytest
import torch
import trio
from tiny_adapters import save_adapter, with_adapter
from tiny_swarm import SPANS, TinySwarm, open_tiny_swarm
from tiny_training import TUNED_PATHS, LocalBlocks, left_padding, random_states, random_tuning
from tuned_models import MASK, TOKENS, Family

from p2pswarm.blocks.architecture import Head
from p2pswarm.checkpoint.checkpoint import Checkpoint
from p2pswarm.client.autograd import BlocksPass
from p2pswarm.client.carried import Carried
from p2pswarm.client.config import ClientConfig
from p2pswarm.client.local_blocks import load_local_blocks
from p2pswarm.client.step_input import StepInput
from p2pswarm.client.tuning import Tuning
from p2pswarm.core.errors import ConfigError, MissingBlocksError
from p2pswarm.core.span import Span
from p2pswarm.models.remote_sequential import RemoteSequential

PROMPT = [5, 17, 99, 3, 42]
GREEDY = {"do_sample": False}
FIRST, MIDDLE, LAST = Span(0, 3), Span(3, 4), Span(4, 8)
TWICE = (FIRST, MIDDLE, LAST, FIRST, MIDDLE, LAST)
ROWS, ROW_TOKENS = 4, 5
STATES, WEIGHTS = random_states(ROWS, ROW_TOKENS, seed=1), random_states(ROWS, ROW_TOKENS, seed=2)


def keeping(local_blocks: int, **options: Any) -> ClientConfig:
    return ClientConfig(known_peers_path=None, local_blocks=local_blocks, **options)


@pytest.fixture(scope="module")
def tuning(tiny_llama: Checkpoint, local: Any) -> Tuning:
    torch.set_num_threads(1)
    return random_tuning(local, tiny_llama, paths=TUNED_PATHS["llama"])


@pytest.mark.parametrize("local_blocks", [1, 2, 3])
async def test_servers_run_only_what_lies_between(open_world, local, local_blocks: int) -> None:
    async with open_world(config=keeping(local_blocks)) as world, world.model.session(max_length=64) as session:
        got = [token async for token in session.generate(PROMPT, max_new_tokens=20, **GREEDY)]
        assert got == local.generate(torch.tensor([PROMPT]), max_new_tokens=20, **GREEDY)[0, 5:].tolist()
        assert session.route.span == Span(local_blocks, 8 - local_blocks)


@pytest.mark.parametrize("model_type", ["gemma2", "gpt2", "bloom"])
async def test_blocks_of_other_families_are_kept_too(tmp_path, model_type: str) -> None:
    """Sliding windows, learned positions, biases of attention by distance."""
    family = Family(tmp_path, model_type)
    expected = family.local().generate(TOKENS, attention_mask=MASK, max_new_tokens=12, **GREEDY)
    async with (
        open_tiny_swarm(family.checkpoint, family.part, SPANS, keeping(2)) as world,
        world.model.session(max_length=64) as session,
    ):
        got = await session.complete(TOKENS, attention_mask=MASK, max_new_tokens=12, **GREEDY)
        assert got.tolist() == expected.tolist()


async def test_servers_of_the_kept_blocks_need_not_be_there(open_world, local) -> None:
    async with open_world(spans=(Span(2, 6),), config=keeping(2)) as world:
        async with world.model.session(max_length=64) as session:
            got = await session.complete(PROMPT, max_new_tokens=5, **GREEDY)
        assert got.tolist() == local.generate(torch.tensor([PROMPT]), max_new_tokens=5, **GREEDY).tolist()
    async with (
        open_world(spans=(Span(2, 6),), config=keeping(1)) as world,
        world.model.session(max_length=64) as session,
    ):
        with pytest.raises(MissingBlocksError, match="no server for blocks 1:2, 6:7 of 1:7"):
            await session.complete(PROMPT, max_new_tokens=5, **GREEDY)


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "temperature": 0.8},
        {"do_sample": False, "num_beams": 4, "length_penalty": 0.5},
        {"do_sample": True, "num_beams": 3, "num_return_sequences": 2},
        {"do_sample": False, "use_cache": False},
        {"do_sample": False, "prompt_lookup_num_tokens": 2},
    ],
    ids=lambda options: "-".join(options),
)
async def test_every_way_to_generate_gives_what_the_local_model_gives(open_world, local, options) -> None:
    prompt = torch.tensor([PROMPT, PROMPT[::-1]])
    if "prompt_lookup_num_tokens" in options:
        prompt = prompt[:1]
    async with open_world(config=keeping(2)) as world, world.model.session(max_length=64) as session:
        torch.manual_seed(3)
        got = await session.complete(prompt, max_new_tokens=12, **options)
        torch.manual_seed(3)
        expected = local.generate(prompt, max_new_tokens=12, **options)
        assert got.tolist() == expected.tolist()


async def test_turns_with_padding_and_going_back_are_the_local_models(open_world, local) -> None:
    prompts = torch.tensor([[0, 0, 0, 7, 9], [0, 0, 4, 8, 15], PROMPT])
    mask = (prompts != 0).long()
    async with open_world(config=keeping(2)) as world, world.model.session(max_length=64) as session:
        first = await session.complete(prompts, attention_mask=mask, max_new_tokens=10, **GREEDY)
        assert first.tolist() == local.generate(prompts, attention_mask=mask, max_new_tokens=10, **GREEDY).tolist()
        session.position = 8
        more = torch.tensor([[20, 21], [22, 23], [24, 25]])
        second = await session.complete(more, max_new_tokens=5, **GREEDY)
        whole = torch.cat([first[:, :8], more], dim=1)
        whole_mask = torch.cat([mask, torch.ones(3, 5, dtype=torch.long)], dim=1)
        expected = local.generate(whole, attention_mask=whole_mask, max_new_tokens=5, **GREEDY)
        assert second.tolist() == expected[:, 8:].tolist()


def a_life(batch_size: int = 3) -> list[StepInput]:
    """Padding, positions of its own, decoding, beams, going back, no tokens at all, another prompt."""
    padding = torch.ones(batch_size, 9, dtype=torch.bool)
    padding[1, :4] = False
    beams = torch.tensor([2, 0, 0])
    states = partial(random_states, batch_size)
    return [
        StepInput(states(9, 1), 0, padding, (padding.cumsum(1) - 1).clamp(min=0)),
        StepInput(states(1, 2), 9, position_ids=torch.tensor([[9], [5], [9]])),
        StepInput(states(1, 3), 10, position_ids=torch.tensor([[10], [6], [10]]), beam_indices=beams),
        StepInput(states(1, 4)[:, :0], 11, beam_indices=torch.tensor([1, 1, 2])),
        StepInput(states(1, 4), 11, position_ids=torch.tensor([[11], [11], [11]])),
        StepInput(states(4, 5), 7),
        StepInput(states(1, 6), 11),
    ]


async def life_without_local_blocks(open_world) -> list[torch.Tensor]:
    async with open_world() as world, world.model.session(max_length=60) as session:
        return [await session.step(step) for step in a_life()]


@pytest.mark.parametrize("lost_before", [1, 2, 5])
async def test_every_step_of_a_life_survives_the_loss_of_all_servers(open_world, lost_before: int) -> None:
    expected = await life_without_local_blocks(open_world)
    async with open_world(spans=TWICE, config=keeping(2)) as world, world.model.session(max_length=60) as session:
        for number, step in enumerate(a_life()):
            if number == lost_before:
                for hop in session.route.hops:
                    world.memory.kill(hop.peer_id)
            answer = await session.step(step)
            torch.testing.assert_close(answer, expected[number], rtol=1e-4, atol=1e-5)
        assert session.num_recoveries == 1


@pytest.mark.parametrize("cut_short", [2, 3, 5])
async def test_step_that_was_cut_short_can_be_made_again(open_world, cut_short: int) -> None:
    expected = await life_without_local_blocks(open_world)
    async with open_world(config=keeping(2)) as world, world.model.session(max_length=60) as session:
        for number, step in enumerate(a_life()):
            if number == cut_short:
                last = session.route.hops[-1].peer_id
                world.memory.hang(last)
                with trio.move_on_after(0.1) as scope:
                    await session.step(step)
                assert scope.cancelled_caught
                world.memory.resume(last)
            answer = await session.step(step)
            torch.testing.assert_close(answer, expected[number], rtol=1e-4, atol=1e-5)


async def test_long_steps_go_in_parts(open_world) -> None:
    step = a_life()[0]
    answers = []
    for max_step_bytes in (1 << 20, 2 * 3 * 64 * 4):
        config = keeping(2, max_step_bytes=max_step_bytes)
        async with open_world(config=config) as world, world.model.session(max_length=60) as session:
            answers.append((await session.step(step))[step.attention_mask])
    torch.testing.assert_close(answers[1], answers[0], rtol=1e-4, atol=1e-5)


async def test_inputs_that_were_let_go_of_come_out_of_the_servers_before(open_world) -> None:
    expected = await life_without_local_blocks(open_world)
    config = keeping(2, max_history_bytes=1)
    async with open_world(spans=TWICE, config=config) as world, world.model.session(max_length=60) as session:
        for number, step in enumerate(a_life()):
            if number == 4:
                world.memory.kill(session.route.hops[-1].peer_id)
            answer = await session.step(step)
            torch.testing.assert_close(answer, expected[number], rtol=1e-4, atol=1e-5)


async def test_two_sessions_at_once_do_not_mix(open_world, local) -> None:
    results: dict[int, list[int]] = {}

    async def generate(world: TinySwarm, first: int) -> None:
        async with world.model.session(max_length=64) as session:
            tokens = session.generate([first, *PROMPT], max_new_tokens=12, **GREEDY)
            results[first] = [token async for token in tokens]

    async with open_world(config=keeping(2)) as world, trio.open_nursery() as nursery:
        for first in (50, 60, 70):
            nursery.start_soon(generate, world, first)
    for first, tokens in results.items():
        prompt = torch.tensor([[first, *PROMPT]])
        assert tokens == local.generate(prompt, max_new_tokens=12, **GREEDY)[0, 6:].tolist()
    assert len(results) == 3


async def test_tunings_are_applied_in_the_kept_blocks_too(open_world, tiny_llama, local, tuning: Tuning) -> None:
    with torch.no_grad():
        expected = LocalBlocks(tiny_llama, local)(STATES, tuning)
    async with open_world(spans=TWICE, config=keeping(2)) as world:
        async with world.model.session(max_length=20, tuning=tuning) as session:
            answers = [await session.step(StepInput(STATES[:, :2], 0))]
            world.memory.kill(session.route.hops[0].peer_id)
            answers += [await session.step(StepInput(STATES[:, at : at + 1], at)) for at in range(2, ROW_TOKENS)]
        torch.testing.assert_close(torch.cat(answers, 1), expected, rtol=1e-4, atol=1e-5)
        passed = await world.model.forward(STATES, tuning=tuning)
        torch.testing.assert_close(passed, expected, rtol=1e-4, atol=1e-5)


async def test_an_adapter_in_a_folder_goes_along_to_the_kept_blocks_too(open_world, local, tmp_path) -> None:
    folder = save_adapter(tmp_path / "poet", local, seed=1)
    expected = with_adapter(local, folder).generate(torch.tensor([PROMPT]), max_new_tokens=12, **GREEDY)
    async with (
        open_world(config=keeping(2)) as world,
        world.model.session(max_length=64, adapter=str(folder)) as session,
    ):
        got = await session.complete(PROMPT, max_new_tokens=12, **GREEDY)
    assert got.tolist() == expected.tolist()
    assert got.tolist() != local.generate(torch.tensor([PROMPT]), max_new_tokens=12, **GREEDY).tolist()


async def test_virtual_tokens_go_before_the_text_as_ever(open_world) -> None:
    prefix = torch.randn(3, 64, generator=torch.Generator().manual_seed(4))
    answers = []
    for local_blocks in (0, 2):
        async with open_world(config=keeping(local_blocks)) as world:
            world.model.carried = lambda: Carried(prefix)
            async with world.model.session(max_length=64) as session:
                first = await session.complete([PROMPT, PROMPT[::-1]], max_new_tokens=8, **GREEDY)
                session.position = 7
                answers.append([first.tolist(), (await session.complete(max_new_tokens=4, **GREEDY)).tolist()])
    assert answers[0] == answers[1]


@pytest.mark.parametrize("blocks", [Span(0, 8), Span(0, 2), Span(1, 4), Span(3, 5), Span(5, 8), Span(7, 8)], ids=str)
async def test_gradients_are_the_local_models_through_whichever_blocks(
    open_world, tiny_llama, local, tuning: Tuning, blocks: Span
) -> None:
    mask = left_padding(ROWS, ROW_TOKENS)
    reference = LocalBlocks(tiny_llama, local)
    own = tuning if blocks == Span(0, 8) else None
    expected = reference.gradients(STATES, WEIGHTS * mask[..., None], own, mask=mask, blocks=blocks)
    async with open_world(config=keeping(2, max_training_tokens=2 * ROW_TOKENS)) as world:
        leaves = [tensor.clone().requires_grad_() for tensor in (own.tensors if own else ())]
        inputs = STATES.clone().requires_grad_()

        def trained() -> torch.Tensor:
            carried = own.with_tensors(leaves) if own else None
            output = world.model.dispatch.run(BlocksPass(StepInput(inputs, 0, mask), carried, None, blocks))
            (output * WEIGHTS * mask[..., None]).sum().backward()
            return output.detach()

        output = await trio.to_thread.run_sync(trained)
        torch.testing.assert_close(output[mask], expected.output[mask], rtol=1e-4, atol=1e-5)
        for got, wanted in zip([inputs, *leaves], [expected.inputs, *expected.tuning], strict=True):
            assert (got.grad - wanted).norm() <= 1e-4 * wanted.norm()


async def test_lost_servers_change_no_gradient(open_world, tiny_llama, local) -> None:
    expected = LocalBlocks(tiny_llama, local).gradients(STATES, WEIGHTS)
    async with open_world(spans=TWICE, config=keeping(1)) as world:
        training = world.model.dispatch.forward_pass.training
        output, trail = await training.forward(StepInput(STATES, 0))
        world.memory.kill(world.peer_of(MIDDLE))
        world.memory.kill(world.peer_of(FIRST))
        inputs, _ = await training.backward(trail, WEIGHTS)
        torch.testing.assert_close(output, expected.output, rtol=1e-4, atol=1e-5)
        assert (inputs - expected.inputs).norm() <= 1e-4 * expected.inputs.norm()


async def test_slices_of_the_remote_blocks_may_be_kept_ones(open_world, tiny_llama, local) -> None:
    async with open_world(config=keeping(2)) as world:
        blocks = RemoteSequential(world.model)
        with torch.no_grad():
            whole = await trio.to_thread.run_sync(lambda: blocks[2:](blocks[1](blocks[0](STATES))))
            torch.testing.assert_close(whole, LocalBlocks(tiny_llama, local)(STATES), rtol=1e-4, atol=1e-5)


async def test_classifiers_keep_blocks_too(open_world) -> None:
    token_ids = torch.tensor([PROMPT, PROMPT[::-1]])

    async def logits(config: ClientConfig) -> torch.Tensor:
        async with open_world(config=config, head=Head.SEQUENCE_CLASSIFICATION) as world:
            shell = world.model.shell
            shell.config.pad_token_id = 0
            result: torch.Tensor = await trio.to_thread.run_sync(lambda: shell(token_ids, use_cache=False).logits)
            return result

    torch.testing.assert_close(await logits(keeping(2)), await logits(keeping(0)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("local_blocks", [4, 5, 100])
def test_blocks_must_be_left_to_servers(tiny_llama: Checkpoint, local_blocks: int) -> None:
    with pytest.raises(ConfigError, match=rf"local_blocks {local_blocks} .* of the 8 blocks .*: at most 3"):
        load_local_blocks(tiny_llama, local_blocks, torch.float32)


def test_number_of_kept_blocks_is_not_negative() -> None:
    with pytest.raises(ConfigError, match="local_blocks is a number of blocks, 0 or more, got -1"):
        keeping(-1)


def test_only_the_kept_blocks_weights_are_read(tiny_llama: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []
    read = Checkpoint.read

    def noted(checkpoint: Checkpoint, wanted: Any) -> dict[str, torch.Tensor]:
        names.extend(wanted)
        return read(checkpoint, wanted)

    monkeypatch.setattr(Checkpoint, "read", noted)
    load_local_blocks(tiny_llama, 2, torch.float32)
    assert {name.split(".")[2] for name in names} == {"0", "1", "6", "7"}
    assert all(name.startswith("model.layers.") for name in names)


async def test_an_adapter_that_only_servers_have_is_refused_before_anything_is_sent(open_world, monkeypatch) -> None:
    async with open_world(config=keeping(2)) as world:

        async def find_adapter(name: str | None) -> str | None:
            return name

        monkeypatch.setattr(world.model.servers, "find_adapter", find_adapter)
        with pytest.raises(ConfigError, match=r"the adapter poet, and the blocks 0:2 and 6:8, .* give a folder"):
            async with world.model.session(max_length=20, adapter="poet"):
                pass
        with pytest.raises(ConfigError, match="the adapter poet, and the blocks 0:2 and 6:8"):
            await world.model.forward(STATES, adapter="poet")
