"""A span runs any part of itself, as overlapping routes ask for, exactly as a server of that part alone would."""

from collections.abc import Collection
from dataclasses import dataclass

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PretrainedConfig

from p2pswarm.blocks.span_model import load_span
from p2pswarm.core.span import Span


@dataclass
class WeightsInMemory:
    config: PretrainedConfig
    tensors: dict[str, torch.Tensor]
    name: str = "tiny"
    generation_config: None = None

    @property
    def tensor_names(self) -> frozenset[str]:
        return frozenset(self.tensors)

    def read(self, names: Collection[str]) -> dict[str, torch.Tensor]:
        return {name: self.tensors[name] for name in names}

    def release(self) -> None:
        """Nothing is held but what the test holds."""


@pytest.fixture(scope="module")
def weights() -> WeightsInMemory:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        num_hidden_layers=6,
        num_attention_heads=4,
        intermediate_size=64,
        num_key_value_heads=2,
    )
    return WeightsInMemory(config, dict(LlamaForCausalLM(config).state_dict()))


@pytest.mark.parametrize("part", [Span(1, 3), Span(2, 4), Span(3, 6), Span(4, 5), Span(1, 6)])
def test_a_part_equals_a_span_of_its_own_step_by_step(weights: WeightsInMemory, part: Span) -> None:
    whole, alone = load_span(weights, Span(1, 6)), load_span(weights, part)
    whole_cache, alone_cache = whole.new_cache(2, part), alone.new_cache(2)
    hidden_states = torch.randn(2, 9, 32)
    for start, end in ((0, 5), (5, 6), (6, 9)):
        new = hidden_states[:, start:end]
        expected = alone.run(new, alone_cache, position=start)
        assert torch.equal(whole.run(new, whole_cache, position=start, blocks=part), expected)
    assert len(whole_cache.held) == part.num_blocks


def test_the_whole_span_is_itself_again_after_a_part_ran(weights: WeightsInMemory) -> None:
    whole = load_span(weights, Span(0, 6))
    hidden_states = torch.randn(1, 4, 32)
    expected = whole.run(hidden_states, None, position=0)
    in_parts = hidden_states
    for part in (Span(0, 2), Span(2, 5), Span(5, 6)):
        in_parts = whole.run(in_parts, None, position=0, blocks=part)
    assert torch.equal(in_parts, expected)
    assert torch.equal(whole.run(hidden_states, None, position=0), expected)


def test_a_part_outside_the_span_is_refused(weights: WeightsInMemory) -> None:
    with pytest.raises(ValueError, match="blocks 0:3 are not in the span 1:6"):
        load_span(weights, Span(1, 6)).run(torch.randn(1, 2, 32), None, position=0, blocks=Span(0, 3))
