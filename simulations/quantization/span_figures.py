"""Memory and speed of one model's blocks in a process of its own, where nothing else is resident or running.

    python -m simulations.quantization.span_figures FOLDER none|int8|nf4 THREADS

prints `SpanFigures` as JSON; `measure_span` starts that and reads it.
"""

import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from p2pswarm.blocks.architecture import lay_out
from p2pswarm.blocks.heap import trim_heap
from p2pswarm.blocks.quantization import weights_bytes
from p2pswarm.blocks.span_model import SpanModel, load_span
from p2pswarm.checkpoint.checkpoint import open_checkpoint
from p2pswarm.core.quantization import Quantization
from p2pswarm.core.span import Span

DECODE_STEPS = 20
PROMPT_TOKENS = 128
BATCH_ROWS = 8


@dataclass(frozen=True, slots=True)
class SpanFigures:
    weights_bytes: int
    """As counted."""
    block_bytes: int
    """Of one block as the checkpoint has it."""
    resident_bytes: int
    """Beyond what the process had before it loaded the span."""
    peak_bytes: int
    """While it loaded, likewise."""
    load_s: float
    decode_s: float
    batched_decode_s: float
    """A step of `BATCH_ROWS` sequences."""
    prompt_token_s: float


def measure_span(folder: Path, quantization: Quantization, threads: int) -> SpanFigures:
    """The figures of all the model's blocks, measured in a fresh process."""
    module = "simulations.quantization.span_figures"
    command = [sys.executable, "-m", module, str(folder), quantization.value, str(threads)]
    finished = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return SpanFigures(**json.loads(finished.stdout))


def measure_here(folder: Path, quantization: Quantization) -> SpanFigures:
    checkpoint = open_checkpoint(str(folder))
    span = Span(0, checkpoint.num_blocks)
    blocks = lay_out(checkpoint.config, torch.float32).blocks
    load_span(checkpoint, Span(0, 1), quantization=quantization)  # imports and compiles what is needed for it
    checkpoint.release()
    before_bytes = resident_bytes()
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    started_s = time.perf_counter()
    model = load_span(checkpoint, span, quantization=quantization)
    load_s = time.perf_counter() - started_s
    peak_bytes = memory_bytes("VmHWM") - before_bytes
    checkpoint.release()
    kept_bytes = resident_bytes() - before_bytes
    prompt = torch.randn(1, PROMPT_TOKENS, model.hidden_size)
    return SpanFigures(
        weights_bytes=sum(weights_bytes(block, quantization) for block in blocks),
        block_bytes=weights_bytes(blocks[0], Quantization.NONE),
        resident_bytes=kept_bytes,
        peak_bytes=peak_bytes,
        load_s=load_s,
        decode_s=decode_s(model, 1),
        batched_decode_s=decode_s(model, BATCH_ROWS),
        prompt_token_s=took_s(partial(model.run, prompt, None, position=0)) / PROMPT_TOKENS,
    )


def decode_s(model: SpanModel, rows: int) -> float:
    """One step of so many sequences: the fastest of some, since slower ones measure the machine's other work."""
    cache = model.new_cache(rows, max_length=DECODE_STEPS)
    states = torch.randn(rows, 1, model.hidden_size)
    return min(took_s(partial(model.run, states, cache, position=position)) for position in range(DECODE_STEPS))


def took_s(function: Callable[[], object]) -> float:
    started_s = time.perf_counter()
    function()
    return time.perf_counter() - started_s


def resident_bytes() -> int:
    """Once all that is free has been given back, as servers do."""
    gc.collect()
    trim_heap()
    return memory_bytes("VmRSS")


def memory_bytes(name: str) -> int:
    """A figure of this process as Linux keeps it: `VmRSS` is resident now, `VmHWM` was at most."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(f"this system does not tell {name}")


if __name__ == "__main__":
    folder, kind, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    print(json.dumps(asdict(measure_here(Path(folder), Quantization(kind)))))
