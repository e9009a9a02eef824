"""What do int8 and nf4 weights save, how fast do they decode, and what do they cost in quality?

    python -m simulations.quantization.run            # some minutes; writes the tables of docs/quantization.md
    python -m simulations.quantization.run --quick    # short text, one round, prints only

Method. Memory and speed: a Llama-shaped model with random weights, hidden size 2048, eight blocks, in float32; for each
way to hold its weights, a fresh process loads all blocks and decodes, on one thread. The ways take turns for several
rounds, and each figure is the median of its rounds, so that a busy moment of the machine strikes none of them alone.
Quality: SmolLM2-135M's perplexity on a text in the public domain (tests/data), all its blocks quantized; computed as
servers do, and as bitsandbytes does, which shows what rounding the states to int8 adds.

Exits 1 unless nf4 decodes three times as fast as float32 and int8 twice, the weights take the memory they should, and
no more than one unquantized block beyond it while they load.
"""

import argparse
import statistics
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from p2pswarm.checkpoint.checkpoint import open_checkpoint
from p2pswarm.core.quantization import Quantization
from p2pswarm.testing.tiny_checkpoints import save_tiny_checkpoint
from simulations.quantization.page import PAGE, quality_table, speed_table, with_tables
from simulations.quantization.perplexity import Quality, load_blocks, perplexity
from simulations.quantization.span_figures import SpanFigures, measure_span
from swarm_cli.sample_model import sample_model

SHAPE: Mapping[str, Any] = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
}
TEXT = Path("tests/data/us_constitution.txt")
QUICK_TOKENS = 512
MIN_SPEEDUP = {Quantization.NONE: 1.0, Quantization.INT8: 2.0, Quantization.NF4: 3.0}
SLACK_BYTES = 64 << 20
"""What a process may take beside weights, for caches, code and what malloc keeps."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a short text, one round, and no page is written")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    flags = parser.parse_args()
    warnings.simplefilter("ignore")  # bitsandbytes tells of every dtype that it converts
    torch.set_num_threads(flags.threads)
    print((__doc__ or "").split("\n\n")[0] + "\n")
    speeds = measure_speeds(1 if flags.quick else flags.rounds, flags.threads)
    print(speed_table(speeds) + "\n")
    qualities = measure_qualities(QUICK_TOKENS if flags.quick else None)
    print(quality_table(qualities) + "\n")
    if not flags.quick:
        PAGE.write_text(with_tables(PAGE.read_text(), speeds, qualities))
        print(f"written to {PAGE}\n")
    complaints = shortcomings(speeds)
    print("\n".join(complaints) or "All is as it should be.")
    return 1 if complaints else 0


def measure_speeds(rounds: int, threads: int) -> Mapping[Quantization, SpanFigures]:
    with tempfile.TemporaryDirectory() as temporary:
        folder = save_tiny_checkpoint(Path(temporary), "llama", **SHAPE)
        found = [{kind: measure_span(folder, kind, threads) for kind in Quantization} for _ in range(rounds)]
    return {kind: _median([figures[kind] for figures in found]) for kind in Quantization}


def _median(found: Sequence[SpanFigures]) -> SpanFigures:
    medians = {
        one.name: statistics.median(getattr(figures, one.name) for figures in found) for one in fields(SpanFigures)
    }
    return SpanFigures(**medians)


def measure_qualities(num_tokens: int | None) -> Sequence[Quality]:
    checkpoint = open_checkpoint(sample_model())
    token_ids = checkpoint.tokenizer().encode(TEXT.read_text())[:num_tokens]
    found = []
    for kind in Quantization:
        for by_bitsandbytes in (False, True) if kind is not Quantization.NONE else (False,):
            blocks = load_blocks(checkpoint, kind, by_bitsandbytes=by_bitsandbytes)
            found.append(Quality(kind, by_bitsandbytes, perplexity(checkpoint, blocks, token_ids)))
    return found


def shortcomings(speeds: Mapping[Quantization, SpanFigures]) -> Sequence[str]:
    """What is not as it should be."""
    unquantized = speeds[Quantization.NONE]
    complaints = []
    for kind, figures in speeds.items():
        speedup = unquantized.decode_s / figures.decode_s
        if speedup < MIN_SPEEDUP[kind]:
            complaints.append(f"{kind.value} decodes only {speedup:.2f} times as fast")
        if kind is Quantization.NONE:
            continue
        if figures.resident_bytes > figures.weights_bytes + SLACK_BYTES:
            complaints.append(f"{kind.value} takes {figures.resident_bytes} bytes, of weights {figures.weights_bytes}")
        if figures.peak_bytes > figures.weights_bytes + figures.block_bytes + SLACK_BYTES:
            complaints.append(f"{kind.value} takes {figures.peak_bytes} bytes while it loads")
    return complaints


if __name__ == "__main__":
    sys.exit(main())
