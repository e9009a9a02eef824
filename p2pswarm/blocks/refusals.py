"""Model types that cannot be cut into spans, and why: the one place where a model type is known by its name.

Here stands only what `architecture.py` cannot see in a config or in the shape of a model.
"""

from collections.abc import Mapping

DRAFTS = "it drafts words for another model, from that model's keys and values"

REFUSALS: Mapping[str, str] = {
    "gemma4_assistant": DRAFTS,
    "gemma4_unified_assistant": DRAFTS,
    "moshi": "transformers forgets keys and values outside its sliding window but does not mask them, so that its "
    "answers depend on how many tokens come at once",
    "phi4_multimodal": "its adapters for pictures and sound sit in every block, and serving it has not been tried",
    "reformer": "its attention sorts the tokens of the whole text into buckets, so no token's keys are ever final",
    "xlnet": "its attention is not causal: earlier tokens look at later ones",
}
