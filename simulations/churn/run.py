"""What do failing servers cost a text, with caches and restarts, without caches, and with Algorithm 1?

    python -m simulations.churn.run           # all cells; writes docs/churn.md and docs/churn.svg; 7 minutes
    python -m simulations.churn.run --quick   # 128 tokens, one seed; prints, writes nothing

The table of the Petals paper (arXiv 2312.08361) once more, with this project's own client: `p2pswarm.client`, its
routing, calls and wire format run as they are, against simulated servers, on a simulated clock. See docs/churn.md.
"""

import argparse
import logging
import time
from pathlib import Path

import torch

from simulations.churn.chart import chart
from simulations.churn.experiment import LENGTHS, Cell, run_all
from simulations.churn.page import line, page, tables

PAGE_PATH = Path("docs/churn.md")
CHART_PATH = Path("docs/churn.svg")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="128 tokens, one seed; writes nothing")
    parser.add_argument("--seeds", type=int, default=5, help="how many")
    flags = parser.parse_args()
    seeds = range(1, 2 if flags.quick else flags.seeds + 1)
    print(f"{__doc__.splitlines()[0]}\n\nseeds {', '.join(map(str, seeds))}\n")
    began_s = time.perf_counter()
    cells = run_all(LENGTHS[:1] if flags.quick else LENGTHS, seeds, _print)
    print(f"\n{tables(cells)}\n{time.perf_counter() - began_s:.0f} s of real time")
    if not flags.quick:
        PAGE_PATH.write_text(page(cells, len(seeds)))
        CHART_PATH.write_text(chart(cells))
        print(f"written: {PAGE_PATH}, {CHART_PATH}")


def _print(cell: Cell) -> None:
    print(line(cell), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    logging.getLogger("p2pswarm").setLevel(logging.ERROR)  # servers that fail and are missed are what this is about
    main()
