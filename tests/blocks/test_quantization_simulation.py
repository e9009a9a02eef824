"""What quantized weights save is measured in fresh processes, and the figures are set in their page."""

from pathlib import Path

import pytest
import torch

from p2pswarm.checkpoint.checkpoint import open_checkpoint
from p2pswarm.core.quantization import Quantization
from p2pswarm.testing.tiny_checkpoints import save_tiny_checkpoint
from simulations.quantization.page import BEGIN, END, PAGE, with_tables
from simulations.quantization.perplexity import Quality, load_blocks, perplexity
from simulations.quantization.run import shortcomings
from simulations.quantization.span_figures import SpanFigures, measure_span

REPOSITORY = Path(__file__).parents[2]
MIB = 1 << 20
SHAPE = {"hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16, "num_key_value_heads": 16}
KEPT_BYTES = 40 * MIB
"""By malloc and for the first run, beside the weights: less than one block, which is 52 MiB."""


def figures(decode_s: float, weights_mib: int = 100, resident_mib: int = 110, peak_mib: int = 140) -> SpanFigures:
    sizes = weights_mib * MIB, 50 * MIB, resident_mib * MIB, peak_mib * MIB
    return SpanFigures(*sizes, load_s=1.0, decode_s=decode_s, batched_decode_s=0.2, prompt_token_s=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [pytest.param(Quantization.INT8, marks=pytest.mark.exhaustive), Quantization.NF4])
def test_loading_never_takes_more_than_one_block_above_the_final_size(kind: Quantization, tmp_path: Path) -> None:
    folder = save_tiny_checkpoint(tmp_path, "llama", **SHAPE, head_dim=64)  # type: ignore[arg-type]
    found = measure_span(folder, kind, threads=1)
    assert found.weights_bytes < 2.5 * found.block_bytes  # eight blocks in little more than the room of two
    assert found.resident_bytes < found.weights_bytes + KEPT_BYTES
    assert found.peak_bytes < found.weights_bytes + found.block_bytes + KEPT_BYTES


def test_perplexity_of_random_weights_is_near_the_size_of_the_vocabulary(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(save_tiny_checkpoint(tmp_path, "llama")))
    token_ids = torch.randint(3, 128, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    found = [
        perplexity(checkpoint, load_blocks(checkpoint, kind, by_bitsandbytes=False), token_ids) for kind in Quantization
    ]
    assert all(50 < one < 1000 for one in found)
    assert len(set(found)) == 3


def test_shortcomings_are_named() -> None:
    good = {
        Quantization.NONE: figures(1.0),
        Quantization.INT8: figures(0.49),
        Quantization.NF4: figures(0.32),
    }
    assert shortcomings(good) == []
    bad = good | {Quantization.INT8: figures(0.51, resident_mib=170), Quantization.NF4: figures(0.34, peak_mib=220)}
    slow_int8, large_int8, slow_nf4, high_nf4 = shortcomings(bad)
    assert slow_int8 == "int8 decodes only 1.96 times as fast"
    assert large_int8.startswith("int8 takes ")
    assert slow_nf4 == "nf4 decodes only 2.94 times as fast"
    assert high_nf4.endswith("while it loads")


def test_tables_take_their_place_in_the_page() -> None:
    page = (REPOSITORY / PAGE).read_text()
    assert page.count(BEGIN) == page.count(END) == 1
    speeds = dict.fromkeys(Quantization, figures(0.125))
    qualities = [Quality(Quantization.NONE, False, 8.0), Quality(Quantization.NF4, True, 10.0)]
    made = with_tables(f"before\n{BEGIN}\nold\n{END}\nafter\n", speeds, qualities)
    assert "old" not in made
    assert made.startswith(f"before\n{BEGIN}\n\n| weights")
    assert made.endswith(f"{END}\nafter\n")
    assert "| int8 | 100 | 110 | 140 | 1.0 | 8.0 (1.0x) | 40.0 (1.0x) | 100.0 (1.0x) |" in made
    assert "| nf4 | bitsandbytes | 10.000 | +25.0% |" in made
