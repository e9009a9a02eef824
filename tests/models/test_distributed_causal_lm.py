"""For a blocking program the model in a swarm is transformers' own: same class, same `generate`, same tokens."""

import threading
from collections.abc import Iterator

import pytest
import torch
import trio
from transformers import LlamaForCausalLM, TextIteratorStreamer

from p2pswarm.client.config import ClientConfig
from p2pswarm.client.portal import Portal
from p2pswarm.core.errors import ConfigError, MissingBlocksError, SessionClosed
from p2pswarm.core.span import Span
from p2pswarm.models.auto import AutoDistributedModelForCausalLM
from p2pswarm.models.distributed_causal_lm import Connection, distributed

PROMPT = torch.tensor([[5, 17, 99, 3, 42]])
GREEDY = {"do_sample": False}


class Blocking:
    """The model as `from_pretrained` would give it, over the in-memory swarm."""

    def __init__(self, open_world, config: ClientConfig | None = None) -> None:
        portal = Portal()
        self.world = portal.enter(open_world(call=portal.call, config=config)).value
        self.portal = portal
        self.model = distributed(self.world.model.shell, Connection(portal, None, self.world.model))


@pytest.fixture
def blocking(open_world) -> Iterator[Blocking]:
    opened = Blocking(open_world)
    with opened.model:
        yield opened


def all_room_is_free(blocking: Blocking) -> bool:
    blocking.portal.call(trio.sleep, 0.1)  # servers hear of a session's end a moment later
    return blocking.world.all_room_is_free()


def test_model_is_of_transformers_own_class_and_holds_no_blocks(blocking, local) -> None:
    assert isinstance(blocking.model, LlamaForCausalLM)
    assert type(blocking.model).__name__ == "LlamaForCausalLM"
    in_blocks = sum(parameter.numel() for parameter in local.model.layers.parameters())
    assert blocking.model.num_parameters() == local.num_parameters() - in_blocks


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 10, **GREEDY},
        {"max_length": 14, **GREEDY},
        {"max_new_tokens": 8, "do_sample": True, "top_p": 0.9},
        {"max_new_tokens": 8, "num_beams": 3, **GREEDY},
        {"max_new_tokens": 6, "use_cache": False, **GREEDY},
        {"max_new_tokens": 6, "return_dict_in_generate": True, "output_scores": True, **GREEDY},
    ],
    ids=lambda options: "-".join(options),
)
def test_generate_outside_a_session_opens_one_and_gives_its_room_back(blocking, local, options) -> None:
    results = []
    for model in (blocking.model, local):
        torch.manual_seed(7)
        result = model.generate(PROMPT, **options)
        results.append(getattr(result, "sequences", result).tolist())
    assert results[0] == results[1]
    assert all_room_is_free(blocking)


def test_inputs_may_be_named_as_transformers_names_them(blocking, local) -> None:
    got = blocking.model.generate(input_ids=PROMPT, attention_mask=torch.ones_like(PROMPT), max_new_tokens=4, **GREEDY)
    assert got.tolist() == local.generate(PROMPT, max_new_tokens=4, **GREEDY).tolist()


def test_chat_in_one_session_takes_new_tokens_only(blocking, local) -> None:
    text = torch.empty(1, 0, dtype=torch.long)
    with blocking.model.inference_session(max_length=64) as session:
        for turn in (PROMPT, torch.tensor([[8, 9]]), torch.tensor([[10]])):
            got = blocking.model.generate(turn, max_new_tokens=5, **GREEDY)
            text = torch.cat([text, turn], dim=1)
            text = local.generate(text, attention_mask=torch.ones_like(text), max_new_tokens=5, **GREEDY)
            assert got.tolist() == text[:, -turn.shape[1] - 5 :].tolist()
        assert session.token_ids.tolist() == text.tolist()
        assert session.position == text.shape[1] - 1
        assert [str(hop.span) for hop in session.route.hops] == ["0:3", "3:4", "4:8"]
    assert all_room_is_free(blocking)


def test_results_with_scores_are_cut_to_the_new_tokens_too(blocking) -> None:
    with blocking.model.inference_session(max_length=64):
        blocking.model.generate(PROMPT, max_new_tokens=3, **GREEDY)
        result = blocking.model.generate(PROMPT, max_new_tokens=3, return_dict_in_generate=True, **GREEDY)
        assert result.sequences.shape == (1, 8)


def test_position_goes_back(blocking) -> None:
    with blocking.model.inference_session(max_length=64) as session:
        first = blocking.model.generate(PROMPT, max_new_tokens=8, **GREEDY)
        session.position = 7
        again = blocking.model.generate(max_new_tokens=6, **GREEDY)
        assert again.tolist() == first[:, 7:].tolist()


def test_steps_take_hidden_states(blocking, local) -> None:
    embedded = blocking.model.get_input_embeddings()(PROMPT)
    with blocking.model.inference_session(max_length=64) as session, torch.inference_mode():
        parts = [session.step(embedded[:, :3]), session.step(embedded[:, 3:])]
        logits = blocking.model.lm_head(blocking.model.model.norm(torch.cat(parts, dim=1)))
        torch.testing.assert_close(logits, local(PROMPT).logits, rtol=1e-4, atol=1e-4)
        assert session.position == 5


def test_session_given_by_name_works_in_another_thread(blocking, local) -> None:
    tokenizer = blocking.model.tokenizer
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    session = blocking.model.inference_session(max_length=64)
    options = {"session": session, "streamer": streamer, "max_new_tokens": 6, **GREEDY}
    thread = threading.Thread(target=blocking.model.generate, args=(PROMPT,), kwargs=options)
    thread.start()
    text = "".join(streamer)
    thread.join()
    expected = local.generate(PROMPT, max_new_tokens=6, **GREEDY)[0, 5:]
    assert text.split() == tokenizer.decode(expected).split()
    session.close()
    session.close()
    with pytest.raises(SessionClosed):
        blocking.model.generate(PROMPT, session=session, max_new_tokens=2)


def test_threads_generate_side_by_side(blocking, local) -> None:
    results: dict[int, list[list[int]]] = {}

    def generate(first: int) -> None:
        prompt = torch.cat([torch.tensor([[first]]), PROMPT], dim=1)
        results[first] = blocking.model.generate(prompt, max_new_tokens=10, **GREEDY).tolist()

    threads = [threading.Thread(target=generate, args=(first,)) for first in (50, 60, 70)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for first, got in results.items():
        prompt = torch.cat([torch.tensor([[first]]), PROMPT], dim=1)
        assert got == local.generate(prompt, max_new_tokens=10, **GREEDY).tolist()
    assert len(results) == 3


@torch.inference_mode()
def test_plain_forward_gives_the_logits(blocking, local) -> None:
    torch.testing.assert_close(blocking.model(PROMPT).logits, local(PROMPT).logits, rtol=1e-4, atol=1e-4)


def test_errors_cross_the_portal_typed_and_the_session_goes_on_when_the_server_is_back(open_world, local) -> None:
    blocking = Blocking(open_world, ClientConfig(known_peers_path=None, recovery_timeout_s=0.3))
    world = blocking.world
    with blocking.model, blocking.model.inference_session(max_length=64):
        blocking.model.generate(PROMPT, max_new_tokens=2, **GREEDY)
        lost = world.peer_of(Span(3, 4))
        blocking.portal.call(trio.to_thread.run_sync, lambda: trio.from_thread.run_sync(world.memory.hang, lost))
        with pytest.raises(MissingBlocksError, match=rf"no server for blocks 3:4 .*{lost}"):
            blocking.model.generate(max_new_tokens=2, **GREEDY)
        blocking.portal.call(trio.to_thread.run_sync, lambda: trio.from_thread.run_sync(world.memory.resume, lost))
        tail = blocking.model.generate(max_new_tokens=2, **GREEDY)
    assert tail.tolist() == local.generate(PROMPT, max_new_tokens=4, **GREEDY)[:, -2:].tolist()


def test_generation_longer_than_the_session_is_refused_by_name(blocking) -> None:
    with blocking.model.inference_session(max_length=8), pytest.raises(ConfigError, match="max_length 8"):
        blocking.model.generate(PROMPT, max_new_tokens=20, **GREEDY)


def test_closed_model_says_so(blocking) -> None:
    session = blocking.model.inference_session(max_length=8)
    blocking.model.close()
    session.close()
    with pytest.raises(SessionClosed, match="load the model again"):
        blocking.model.generate(PROMPT, max_new_tokens=2)


def test_auto_class_has_no_instances() -> None:
    with pytest.raises(TypeError, match="from_pretrained"):
        AutoDistributedModelForCausalLM()
