"""A tuned prompt in front of texts: what the blocks are told counts it, what the model's caller sees does not."""

from collections.abc import Callable

import pytest
import torch

from p2pswarm.blocks.architecture import Head
from p2pswarm.blocks.client_model import BlocksCall, SwarmCache, blocks_of, load_client_model
from p2pswarm.blocks.virtual_tokens import with_prefix
from p2pswarm.checkpoint.checkpoint import Checkpoint, open_checkpoint
from p2pswarm.core.errors import UnsupportedModelError
from p2pswarm.testing.tiny_checkpoints import save_tiny_checkpoint

PREFIX = torch.full((3, 64), 0.5)
TOKENS = torch.tensor([[0, 6, 7], [8, 9, 10]])
MASK = torch.tensor([[0, 1, 1], [1, 1, 1]])
POSITIONS = torch.tensor([[1, 0, 1], [0, 1, 2]])


@pytest.fixture(scope="module")
def checkpoint_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    torch.set_num_threads(1)
    home = tmp_path_factory.mktemp("models")
    return lambda model_type: open_checkpoint(str(save_tiny_checkpoint(home / model_type, model_type)))


class Recorder:
    def __init__(self) -> None:
        self.calls: list[BlocksCall] = []

    def __call__(self, call: BlocksCall) -> torch.Tensor:
        self.calls.append(call)
        return call.hidden_states


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt", "bloom"])
def test_blocks_are_told_of_virtual_tokens_and_callers_are_not(
    checkpoint_of: Callable[[str], Checkpoint], model_type: str
) -> None:
    blocks = Recorder()
    model = load_client_model(checkpoint_of(model_type), blocks)
    blocks_of(model).prefix = lambda: PREFIX
    cache = SwarmCache()

    first = model(TOKENS, attention_mask=MASK, past_key_values=cache)
    longer = torch.cat([MASK, torch.ones(2, 2, dtype=torch.long)], dim=1)
    second = model(TOKENS[:, :2], attention_mask=longer, past_key_values=cache)

    assert (first.logits.shape[1], second.logits.shape[1], cache.get_seq_length()) == (3, 2, 5)
    beginning, rest = blocks.calls
    assert (beginning.position, beginning.hidden_states.shape[1]) == (0, 6)
    assert beginning.attention_mask.tolist() == [[True, True, True, False, True, True], [True] * 6]
    assert (rest.position, rest.hidden_states.shape[1], rest.attention_mask.shape[1]) == (6, 2, 8)


def test_position_ids_go_on_after_the_virtual_tokens(checkpoint_of: Callable[[str], Checkpoint]) -> None:
    blocks = Recorder()
    model = load_client_model(checkpoint_of("llama"), blocks)
    blocks_of(model).prefix = lambda: PREFIX
    cache = SwarmCache()

    model(TOKENS, attention_mask=MASK, position_ids=POSITIONS, past_key_values=cache)
    model(TOKENS[:, :1], position_ids=torch.tensor([[2], [3]]), past_key_values=cache)
    model(TOKENS[:, :1], position_ids=torch.tensor([[4], [4]]), past_key_values=cache)

    given = [call.position_ids for call in blocks.calls]
    assert given[0].tolist() == [[0, 1, 2, 4, 3, 4], [0, 1, 2, 3, 4, 5]]
    assert given[1].tolist() == [[5], [6]]
    assert given[2] is None  # they just count on


def test_a_text_that_starts_over_has_its_prompt_again(checkpoint_of: Callable[[str], Checkpoint]) -> None:
    blocks = Recorder()
    model = load_client_model(checkpoint_of("llama"), blocks)
    blocks_of(model).prefix = lambda: PREFIX
    cache = SwarmCache()

    model(TOKENS, past_key_values=cache)
    cache.position = 0
    model(TOKENS[:, :2], past_key_values=cache)

    assert [call.hidden_states.shape[1] for call in blocks.calls] == [6, 5]
    assert cache.position == 2


def test_a_failed_call_leaves_nothing_behind(checkpoint_of: Callable[[str], Checkpoint]) -> None:
    def fail(call: BlocksCall) -> torch.Tensor:
        raise ConnectionError("no swarm")

    blocks = Recorder()
    model = load_client_model(checkpoint_of("llama"), blocks)
    blocks_of(model).prefix = lambda: PREFIX
    cache = SwarmCache()
    model(TOKENS, past_key_values=cache)
    blocks_of(model).run_blocks = fail
    with pytest.raises(ConnectionError):
        model(TOKENS, past_key_values=cache)

    assert (cache.position, cache.get_seq_length()) == (3, 3)
    blocks_of(model).run_blocks = blocks
    model(TOKENS[:, :1], past_key_values=cache)
    assert blocks.calls[-1].position == 6


def test_embeddings_may_be_given_instead_of_tokens() -> None:
    embeddings = torch.rand(2, 3, 64)

    inputs = with_prefix(PREFIX, {"inputs_embeds": embeddings}, 0, lambda tokens: tokens)

    assert inputs["inputs_embeds"][:, 3:].equal(embeddings)
    assert inputs["inputs_embeds"][:, :3].equal(PREFIX.expand(2, 3, 64))


def test_a_new_head_is_drawn_by_its_seed_and_takes_any_dtype(checkpoint_of: Callable[[str], Checkpoint]) -> None:
    def load(seed: int) -> torch.nn.Module:
        return load_client_model(
            checkpoint_of("llama"),
            lambda call: call.hidden_states,
            dtype=torch.bfloat16,
            head=Head.SEQUENCE_CLASSIFICATION,
            num_labels=5,
            seed=seed,
        )

    one, same, other = load(1), load(1), load(2)

    assert one.score.weight.equal(same.score.weight)
    assert not one.score.weight.equal(other.score.weight)
    logits = one(TOKENS[1:]).logits
    assert (logits.shape, logits.dtype) == ((1, 5), torch.float32)


def test_a_head_that_an_architecture_does_not_have_is_refused(checkpoint_of: Callable[[str], Checkpoint]) -> None:
    with pytest.raises(UnsupportedModelError, match="no sequence classifier of the type granite"):
        load_client_model(checkpoint_of("granite"), Recorder(), head=Head.SEQUENCE_CLASSIFICATION)
