"""Is a model in pieces the same model? Spans and a client shell in one process, compared with the local model.

`SpanChain` is a swarm without a network; `measure_exactness` puts one through prefill, decoding, padding, beams and
rollback.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch

from p2pswarm.blocks.client_model import BlocksCall, SwarmCache, load_client_model
from p2pswarm.blocks.kv_cache import SpanCache
from p2pswarm.blocks.span_model import SpanModel, load_span
from p2pswarm.checkpoint.checkpoint import Checkpoint
from p2pswarm.checkpoint.local_model import load_local_model
from p2pswarm.core.span import Span

PROMPT_TOKENS = 24
NEW_TOKENS = 20
NUM_BEAMS = 3
FIRST_WORD = 3
"""Token ids below are special ones."""
UNEVEN_SPANS = (Span(0, 3), Span(3, 4), Span(4, 8))


class SpanChain:
    """Runs blocks through spans that lie in this process; a `RunBlocks`."""

    def __init__(self, spans: Sequence[SpanModel]) -> None:
        self.spans = tuple(spans)
        self._caches: WeakKeyDictionary[SwarmCache, list[SpanCache]] = WeakKeyDictionary()

    def __call__(self, call: BlocksCall) -> torch.Tensor:
        hidden_states = call.hidden_states
        for span, cache in zip(self.spans, self._caches_of(call), strict=True):
            if cache is not None and call.beam_indices is not None:
                cache.reorder(call.beam_indices)
            hidden_states = span.run(
                hidden_states,
                cache,
                position=call.position,
                attention_mask=call.attention_mask,
                position_ids=call.position_ids,
            )
        return hidden_states

    def _caches_of(self, call: BlocksCall) -> Sequence[SpanCache | None]:
        if call.cache is None:
            return [None] * len(self.spans)
        if call.cache not in self._caches:
            self._caches[call.cache] = [span.new_cache(call.hidden_states.shape[0]) for span in self.spans]
        return self._caches[call.cache]


@dataclass(frozen=True, slots=True)
class Exactness:
    """Largest differences of logits, and whether the generated tokens are the same."""

    forward_error: float
    decode_error: float
    padded_error: float
    same_tokens: bool
    same_padded_tokens: bool
    same_beams: bool
    same_after_rollback: bool

    def is_exact(self, tolerance: float = 1e-4) -> bool:
        largest = max(self.forward_error, self.decode_error, self.padded_error)
        return largest <= tolerance and all(
            (self.same_tokens, self.same_padded_tokens, self.same_beams, self.same_after_rollback)
        )


@torch.inference_mode()
def measure_exactness(checkpoint: Checkpoint, spans: Sequence[Span] = UNEVEN_SPANS) -> Exactness:
    """Compares the checkpoint's model in `spans` with the whole model. Raises what loading and running raise."""
    local = load_local_model(checkpoint)
    chain = SpanChain([load_span(checkpoint, span) for span in spans])
    client = load_client_model(checkpoint, chain)
    vocabulary_size = checkpoint.config.get_text_config(decoder=True).vocab_size
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(FIRST_WORD, vocabulary_size, (3, PROMPT_TOKENS), generator=generator)
    prompt, padding = prompts[:1], _left_padding(prompts.shape[0])
    padded = prompts.masked_fill(padding == 0, 0)

    cache = SwarmCache()
    expected = _generate(local, prompt)
    got = _generate(client, prompt, past_key_values=cache)
    cache.position = PROMPT_TOKENS // 2
    again = _generate(client, prompt, past_key_values=cache)
    expected_padded = _generate(local, padded, attention_mask=padding)
    got_padded = _generate(client, padded, attention_mask=padding, past_key_values=SwarmCache())
    expected_beams = _generate(local, prompt, num_beams=NUM_BEAMS)
    got_beams = _generate(client, prompt, num_beams=NUM_BEAMS, past_key_values=SwarmCache())
    return Exactness(
        forward_error=_difference(local(prompts, use_cache=False).logits, client(prompts, use_cache=False).logits),
        decode_error=_difference(torch.stack(expected.logits), torch.stack(got.logits)),
        padded_error=_difference(torch.stack(expected_padded.logits), torch.stack(got_padded.logits)),
        same_tokens=torch.equal(expected.sequences, got.sequences),
        same_padded_tokens=torch.equal(expected_padded.sequences, got_padded.sequences),
        same_beams=torch.equal(expected_beams.sequences, got_beams.sequences),
        same_after_rollback=torch.equal(expected.sequences, again.sequences),
    )


def _left_padding(batch_size: int) -> torch.Tensor:
    """A mask that hides 0, 5, 10, ... tokens at the start of the rows."""
    hidden = 5 * torch.arange(batch_size)[:, None]
    return (torch.arange(PROMPT_TOKENS)[None, :] >= hidden).to(torch.int64)


def _generate(model: Any, prompt: torch.Tensor, **options: Any) -> Any:
    options.setdefault("attention_mask", torch.ones_like(prompt))
    return model.generate(
        prompt,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )


def _difference(expected: torch.Tensor, got: torch.Tensor) -> float:
    difference = (expected - got).abs().max().item()
    return float("inf") if difference != difference else float(difference)
