"""The measured figures as tables, and their place in the documentation."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from p2pswarm.core.quantization import Quantization
from simulations.quantization.perplexity import Quality
from simulations.quantization.span_figures import BATCH_ROWS, SpanFigures

PAGE = Path("docs/quantization.md")
BEGIN = "<!-- Made by python -m simulations.quantization.run -->"
END = "<!-- End of what it makes -->"
MIB = 1 << 20


def with_tables(page: str, speeds: Mapping[Quantization, SpanFigures], qualities: Sequence[Quality]) -> str:
    """The page with new tables in the place of the old ones."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{speed_table(speeds)}\n\n{quality_table(qualities)}\n\n{END}{after}"


def speed_table(speeds: Mapping[Quantization, SpanFigures]) -> str:
    unquantized = speeds[Quantization.NONE]
    rows = [
        f"| weights | counted, MiB | resident, MiB | peak of loading, MiB | loads in, s | tokens/s, 1 session "
        f"| tokens/s, {BATCH_ROWS} sessions | prompt tokens/s |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for kind, figures in speeds.items():
        memory = " | ".join(
            f"{size / MIB:.0f}" for size in (figures.weights_bytes, figures.resident_bytes, figures.peak_bytes)
        )
        speed = " | ".join(
            f"{tokens / took_s:.1f} ({before_s / took_s:.1f}x)"
            for tokens, took_s, before_s in (
                (1, figures.decode_s, unquantized.decode_s),
                (BATCH_ROWS, figures.batched_decode_s, unquantized.batched_decode_s),
                (1, figures.prompt_token_s, unquantized.prompt_token_s),
            )
        )
        rows.append(f"| {kind.value} | {memory} | {figures.load_s:.1f} | {speed} |")
    return "\n".join(rows)


def quality_table(qualities: Sequence[Quality]) -> str:
    unquantized = qualities[0].perplexity
    rows = ["| weights | computed by | perplexity | |", "|---|---|---:|---:|"]
    for quality in qualities:
        worse = quality.perplexity / unquantized - 1
        who = "bitsandbytes" if quality.by_bitsandbytes else "swarmd"
        rows.append(f"| {quality.quantization.value} | {who} | {quality.perplexity:.3f} | {worse:+.1%} |")
    return "\n".join(rows)
