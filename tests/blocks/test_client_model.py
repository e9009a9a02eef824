from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from p2pswarm.blocks.client_model import BlocksCall, SwarmCache, load_client_model
from p2pswarm.blocks.span_model import load_span
from p2pswarm.checkpoint.checkpoint import Checkpoint, open_checkpoint
from p2pswarm.core.span import Span
from p2pswarm.testing.exactness import SpanChain
from p2pswarm.testing.tiny_checkpoints import randomize, save_tiny_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    torch.set_num_threads(1)
    return open_checkpoint(str(save_tiny_checkpoint(tmp_path_factory.mktemp("llama"), "llama")))


class Recorder:
    """Blocks that return what they get, and keep the calls."""

    def __init__(self) -> None:
        self.calls: list[BlocksCall] = []

    def __call__(self, call: BlocksCall) -> torch.Tensor:
        self.calls.append(call)
        return call.hidden_states


def test_a_client_holds_no_block_weights(checkpoint: Checkpoint) -> None:
    model = load_client_model(checkpoint, Recorder())

    names = {name for name, _ in model.named_parameters()}

    assert names == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}


def test_a_call_carries_position_padding_and_unusual_positions_only_where_there_are_any(checkpoint: Checkpoint) -> None:
    blocks = Recorder()
    model = load_client_model(checkpoint, blocks)
    cache, tokens = SwarmCache(), torch.tensor([[5, 6, 7], [8, 9, 10]])
    mask = torch.tensor([[1, 1, 1], [0, 1, 1]])

    model(tokens, attention_mask=torch.ones(2, 3), past_key_values=cache)
    model(tokens, attention_mask=torch.cat([mask, mask], dim=1), position_ids=tokens, past_key_values=cache)
    model(tokens, past_key_values=None, use_cache=False)

    plain, padded, alone = blocks.calls
    assert (plain.position, plain.attention_mask, plain.position_ids, plain.cache) == (0, None, None, cache)
    assert padded.position == 3
    assert padded.attention_mask is not None
    assert padded.attention_mask.tolist() == torch.cat([mask, mask], dim=1).bool().tolist()
    assert padded.position_ids is tokens
    assert (alone.position, alone.cache) == (0, None)
    assert cache.get_seq_length() == 6


def test_a_failed_call_leaves_the_position_where_it_was(checkpoint: Checkpoint) -> None:
    def fail(call: BlocksCall) -> torch.Tensor:
        raise ConnectionError("no swarm")

    model = load_client_model(checkpoint, fail)
    cache = SwarmCache()

    with pytest.raises(ConnectionError):
        model(torch.tensor([[5, 6]]), past_key_values=cache)

    assert cache.position == 0


def test_another_kind_of_cache_is_refused_rather_than_run_wrong(checkpoint: Checkpoint) -> None:
    model = load_client_model(checkpoint, Recorder())

    with pytest.raises(TypeError, match="must be a SwarmCache"):
        model(torch.tensor([[5, 6]]), past_key_values=DynamicCache())


def test_reorderings_since_the_last_step_add_up(checkpoint: Checkpoint) -> None:
    blocks = Recorder()
    model = load_client_model(checkpoint, blocks)
    cache, tokens = SwarmCache(), torch.full((3, 1), 5)
    model(tokens, past_key_values=cache)

    cache.reorder_cache(torch.tensor([2, 0, 1]))
    cache.reorder_cache(torch.tensor([1, 1, 0]))
    model(tokens, past_key_values=cache)
    model(tokens, past_key_values=cache)

    assert blocks.calls[0].beam_indices is None
    assert blocks.calls[1].beam_indices is not None
    assert blocks.calls[1].beam_indices.tolist() == [0, 0, 2]
    assert blocks.calls[2].beam_indices is None


def test_a_cache_is_cropped_as_transformers_does() -> None:
    cache = SwarmCache()
    cache.position = 5

    cache.crop(-2)

    assert cache.position == 3
    with pytest.raises(ValueError, match="cannot remove 4 of 3"):
        cache.crop(-4)


def test_sampling_with_a_seed_and_several_turns_equal_the_local_model(checkpoint: Checkpoint) -> None:
    local = AutoModelForCausalLM.from_pretrained(checkpoint._config_folder)
    client = load_client_model(
        checkpoint, SpanChain([load_span(checkpoint, Span(0, 5)), load_span(checkpoint, Span(5, 8))])
    )
    caches = {local: DynamicCache(config=local.config), client: SwarmCache()}
    said = {}

    for model, cache in caches.items():
        torch.manual_seed(7)
        text = torch.tensor([[3, 14, 15]])
        for turn in ([92, 65], [35, 89, 79], [32]):
            text = torch.cat([text, torch.tensor([turn])], dim=1)
            text = model.generate(
                text,
                attention_mask=torch.ones_like(text),
                past_key_values=cache,
                max_new_tokens=8,
                do_sample=True,
                temperature=0.9,
                top_p=0.95,
                eos_token_id=None,
            )
        said[model] = text.tolist()

    assert said[client] == said[local]
    assert len(set(said[client][0])) > 10


def test_the_language_model_of_a_model_that_also_sees_is_served_alone(tmp_path: Path) -> None:
    from transformers import CONFIG_MAPPING

    from p2pswarm.testing.tiny_checkpoints import tiny_config

    text_config = tiny_config("gemma3_text")
    vision_config = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = CONFIG_MAPPING["gemma3"](
        text_config=text_config.to_dict(),
        vision_config={**vision_config, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
    )
    whole = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    randomize(whole, seed=0)
    whole.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(str(tmp_path))
    assert any("language_model" in name for name in checkpoint.tensor_names)
    client = load_client_model(
        checkpoint, SpanChain([load_span(checkpoint, Span(0, 3)), load_span(checkpoint, Span(3, 8))])
    )
    tokens = torch.arange(3, 40)[None]

    with torch.inference_mode():
        difference = client(tokens, use_cache=False).logits - whole(tokens, use_cache=False).logits

    assert difference.abs().max() < 1e-4
