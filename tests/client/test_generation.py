"""Text from a session is the local model's text, token for token: streamed, in batches, with beams, turn by turn."""

import threading

import pytest
import torch
import trio

from p2pswarm.client.config import ClientConfig
from p2pswarm.client.token_stream import TOKENS_AHEAD
from p2pswarm.core.errors import ConfigError, MissingBlocksError
from p2pswarm.core.span import Span

PROMPT = [5, 17, 99, 3, 42]
GREEDY = {"do_sample": False}


def local_tokens(local, prompt, **options) -> list[int]:
    return local.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist()


async def test_streamed_greedy_tokens_are_the_local_models(open_world, local) -> None:
    async with open_world() as world, world.model.session(max_length=64) as session:
        tokens = [token async for token in session.generate(PROMPT, max_new_tokens=20, **GREEDY)]
        assert tokens == local_tokens(local, PROMPT, max_new_tokens=20, **GREEDY)
        assert session.position == len(PROMPT) + 19


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "temperature": 0.8},
        {"do_sample": True, "top_k": 5, "top_p": 0.9},
        {"do_sample": False, "repetition_penalty": 1.5},
        {"do_sample": False, "no_repeat_ngram_size": 2},
        {"do_sample": True, "num_beams": 3, "num_return_sequences": 2},
        {"do_sample": False, "num_beams": 4, "length_penalty": 0.5},
        {"do_sample": True, "num_return_sequences": 3},
        {"do_sample": False, "use_cache": False},
        {"do_sample": False, "prompt_lookup_num_tokens": 2},
    ],
    ids=lambda options: "-".join(options),
)
async def test_every_way_to_generate_gives_what_the_local_model_gives(open_world, local, options) -> None:
    prompt = torch.tensor([PROMPT, PROMPT[::-1]])
    if "prompt_lookup_num_tokens" in options:
        prompt = prompt[:1]
    async with open_world() as world, world.model.session(max_length=64) as session:
        torch.manual_seed(3)
        got = await session.complete(prompt, max_new_tokens=12, **options)
        torch.manual_seed(3)
        expected = local.generate(prompt, max_new_tokens=12, **options)
        assert got.tolist() == expected.tolist()


async def test_prompts_of_different_lengths_in_one_batch(open_world, local) -> None:
    prompts = torch.tensor([[0, 0, 0, 7, 9], [0, 0, 4, 8, 15], PROMPT, [0, 11, 12, 13, 14]])
    mask = (prompts != 0).long()
    async with open_world() as world, world.model.session(max_length=64) as session:
        first = await session.complete(prompts, attention_mask=mask, max_new_tokens=10, **GREEDY)
        expected = local.generate(prompts, attention_mask=mask, max_new_tokens=10, **GREEDY)
        assert first.tolist() == expected.tolist()
        more = torch.tensor([[20, 21], [22, 23], [24, 25], [26, 27]])
        second = await session.complete(more, max_new_tokens=5, **GREEDY)
        whole = torch.cat([expected, more], dim=1)
        whole_mask = torch.cat([mask, torch.ones(4, 12, dtype=torch.long)], dim=1)
        expected = local.generate(whole, attention_mask=whole_mask, max_new_tokens=5, **GREEDY)
        assert second.tolist() == expected[:, 15:].tolist()


async def test_pad_tokens_are_padding_where_no_mask_is_given_as_transformers_has_it(open_world, local) -> None:
    prompts = torch.tensor([[0, 0, 7, 9], [4, 8, 15, 16]])
    async with open_world() as world, world.model.session(max_length=64) as session:
        got = await session.complete(prompts, max_new_tokens=6, **GREEDY)
        assert got.tolist() == local.generate(prompts, max_new_tokens=6, **GREEDY).tolist()
        assert session.history.attention_mask[:, :4].tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]]


async def test_turns_of_a_chat_go_on_where_the_last_one_stopped(open_world, local) -> None:
    async with open_world() as world, world.model.session(max_length=64) as session:
        text: list[int] = []
        for turn in ([5, 6, 7], [8, 9], [10]):
            text += turn
            before = session.position
            answer = [token async for token in session.generate(turn, max_new_tokens=6, **GREEDY)]
            assert answer == local_tokens(local, text, max_new_tokens=6, **GREEDY)
            text += answer
            assert session.position == len(text) - 1 > before
        assert session.history.token_ids.tolist() == [text]


async def test_going_back_forgets_what_came_after(open_world, local) -> None:
    async with open_world() as world, world.model.session(max_length=64) as session:
        first = [token async for token in session.generate(PROMPT, max_new_tokens=6, **GREEDY)]
        session.position = len(PROMPT) + 2
        kept = PROMPT + first[:2]
        assert session.history.token_ids.tolist() == [kept]
        assert [token async for token in session.generate(max_new_tokens=4, **GREEDY)] == first[2:]
        session.position = len(kept)
        other = [token async for token in session.generate([77], max_new_tokens=4, **GREEDY)]
        assert other == local_tokens(local, [*kept, 77], max_new_tokens=4, **GREEDY)
        session.position = 0
        again = [token async for token in session.generate(PROMPT, max_new_tokens=6, **GREEDY)]
        assert again == first


async def test_generation_without_new_tokens_goes_on(open_world, local) -> None:
    async with open_world() as world, world.model.session(max_length=64) as session:
        tokens = [token async for token in session.generate(PROMPT, max_new_tokens=3, **GREEDY)]
        for _ in range(4):
            tokens += [token async for token in session.generate(max_new_tokens=1, **GREEDY)]
        assert tokens == local_tokens(local, PROMPT, max_new_tokens=7, **GREEDY)


async def test_after_beam_search_the_session_starts_over_or_says_why_not(open_world, local) -> None:
    async with open_world() as world, world.model.session(max_length=64) as session:
        await session.complete([PROMPT], max_new_tokens=4, num_beams=3)
        with pytest.raises(ConfigError, match="beam search"):
            await session.complete([PROMPT], max_new_tokens=4)
        session.position = 0
        tokens = [token async for token in session.generate(PROMPT, max_new_tokens=4, **GREEDY)]
        assert tokens == local_tokens(local, PROMPT, max_new_tokens=4, **GREEDY)


async def test_reader_who_leaves_early_stops_the_generation_and_the_session_goes_on_from_there(
    open_world, local
) -> None:
    async with open_world() as world, world.model.session(max_length=180) as session:
        taken = []
        async with session.generate(PROMPT, max_new_tokens=170, **GREEDY) as stream:
            async for token in stream:
                taken.append(token)
                if len(taken) == 5:
                    break
        assert session.position <= len(PROMPT) + 5 + TOKENS_AHEAD + 1
        assert session.history.token_ids.tolist() == [PROMPT + taken]
        more = [token async for token in session.generate(max_new_tokens=5, **GREEDY)]
        assert taken + more == local_tokens(local, PROMPT, max_new_tokens=10, **GREEDY)


async def test_forgotten_stream_stops_and_the_next_generation_waits_for_it(open_world, local) -> None:
    async with open_world() as world, world.model.session(max_length=180) as session:
        taken = []
        async for token in session.generate(PROMPT, max_new_tokens=170, **GREEDY):
            taken.append(token)
            if len(taken) == 5:
                break
        taken += [token async for token in session.generate(max_new_tokens=5, **GREEDY)]
        assert taken == local_tokens(local, PROMPT, max_new_tokens=10, **GREEDY)


async def test_two_generations_at_once_are_refused(open_world) -> None:
    async with open_world() as world, world.model.session(max_length=180) as session:
        stream = session.generate(PROMPT, max_new_tokens=170, **GREEDY)
        await anext(stream)
        with pytest.raises(ConfigError, match="still generating"):
            await anext(session.generate(PROMPT, max_new_tokens=5, **GREEDY))
        with pytest.raises(ConfigError, match="still generating"):
            await session.complete(PROMPT, max_new_tokens=5, **GREEDY)
        await stream.aclose()


async def test_session_can_be_left_while_a_stream_is_held_half_read(open_world) -> None:
    async with open_world() as world:
        with trio.fail_after(20):
            async with world.model.session(max_length=180) as session:
                stream = session.generate(PROMPT, max_new_tokens=170, **GREEDY)
                await anext(stream)
                await trio.sleep(0.5)  # by now the generation waits for its reader
        await stream.aclose()


async def test_failure_beside_a_stream_ends_it(open_world) -> None:
    async def use(world) -> None:
        async with world.model.session(max_length=180) as session:
            async for _ in session.generate(PROMPT, max_new_tokens=170, **GREEDY):
                pass

    async def fail() -> None:
        await trio.sleep(0.3)
        raise KeyError("beside")

    async with open_world() as world:
        with trio.fail_after(20), pytest.RaisesGroup(KeyError):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(use, world)
                nursery.start_soon(fail)


async def test_slow_reader_holds_the_generation_back(open_world, local) -> None:
    async with open_world() as world, world.model.session(max_length=180) as session:
        stream = session.generate(PROMPT, max_new_tokens=60, **GREEDY)
        tokens = [await anext(stream)]
        await trio.sleep(0.7)
        assert session.position <= len(PROMPT) + TOKENS_AHEAD + 2
        tokens += [token async for token in stream]
        assert tokens == local_tokens(local, PROMPT, max_new_tokens=60, **GREEDY)


async def test_cancelled_reader_leaves_no_thread_generating(open_world) -> None:
    async with open_world() as world, world.model.session(max_length=180) as session:
        taken = []
        with trio.move_on_after(0.5) as scope:
            async for token in session.generate(PROMPT, max_new_tokens=170, **GREEDY):
                taken.append(token)
                await trio.sleep(0.2)
        assert scope.cancelled_caught
        with trio.fail_after(5):
            await session.complete([1], max_new_tokens=1)  # waits until the generation has stopped
        assert session.history.token_ids[0, :-2].tolist() == PROMPT + taken


async def test_lost_server_ends_the_stream_with_its_error_never_as_if_the_text_had_ended(open_world) -> None:
    config = ClientConfig(known_peers_path=None, recovery_timeout_s=0.5)
    async with open_world(config=config) as world, world.model.session(max_length=180) as session:
        stream = session.generate(PROMPT, max_new_tokens=170, **GREEDY)
        tokens = [await anext(stream)]
        lost = world.peer_of(Span(3, 4))
        world.memory.kill(lost)
        with pytest.raises(MissingBlocksError, match=lost):
            tokens += [token async for token in stream]
        assert len(tokens) < 170


async def test_three_sessions_generate_at_once(open_world, local) -> None:
    async with open_world() as world:
        results: dict[int, list[int]] = {}

        async def generate(first: int) -> None:
            async with world.model.session(max_length=64) as session:
                tokens = session.generate([first, *PROMPT], max_new_tokens=15, **GREEDY)
                results[first] = [token async for token in tokens]

        async with trio.open_nursery() as nursery:
            for first in (50, 60, 70):
                nursery.start_soon(generate, first)
        for first, tokens in results.items():
            assert tokens == local_tokens(local, [first, *PROMPT], max_new_tokens=15, **GREEDY)
        assert len(results) == 3


async def test_one_models_threads_do_not_see_each_others_inputs(open_world, local) -> None:
    """Each thread is between calling the model and calling its blocks when the other one comes."""
    batch = torch.tensor([[0, 0, *PROMPT], [9, 8, *PROMPT]])
    mask = (batch != 0).long()
    async with open_world() as world:
        expected = local(batch, attention_mask=mask).logits[:, -1]
        got: list[torch.Tensor] = []

        def run() -> None:
            for _ in range(25):
                got.append(world.model.shell(batch, attention_mask=mask, use_cache=False).logits[:, -1])
                world.model.shell(batch[:, :3], use_cache=False)

        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(trio.to_thread.run_sync, run)
        for logits in got:
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


async def test_text_longer_than_the_session_is_an_error_of_ours(open_world, local) -> None:
    async with open_world() as world, world.model.session(max_length=10) as session:
        first = await session.complete(PROMPT, max_new_tokens=3, **GREEDY)
        with pytest.raises(ConfigError, match="max_length 10"):
            await session.complete(max_new_tokens=20, **GREEDY)
        more = await session.complete(max_new_tokens=2, **GREEDY)
        assert (first[0, 5:].tolist() + more[0].tolist()) == local_tokens(local, PROMPT, max_new_tokens=5, **GREEDY)


async def test_prompt_must_be_token_ids(open_world) -> None:
    async with open_world() as world, world.model.session(max_length=10) as session:
        with pytest.raises(ConfigError, match="holds no tokens yet"):
            await session.complete(max_new_tokens=2)
        with pytest.raises(ConfigError, match="got shape"):
            await session.complete([], max_new_tokens=2)


async def test_logits_agree_and_the_model_runs_without_a_session_too(open_world, local) -> None:
    x = torch.tensor([PROMPT, PROMPT[::-1]])
    async with open_world() as world:
        got = await trio.to_thread.run_sync(lambda: world.model.shell(x, use_cache=False).logits)
        with torch.inference_mode():
            torch.testing.assert_close(got, local(x).logits, rtol=1e-4, atol=1e-4)
    assert threading.active_count() < 20
