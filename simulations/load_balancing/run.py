"""How close to the best arrangement of blocks do servers come that each decide for themselves, and at what cost?

    python -m simulations.load_balancing.run           # 8 to 1,000 servers; writes the page and its picture; 15 minutes
    python -m simulations.load_balancing.run --quick   # up to 30 servers; prints, writes nothing; half a minute

Servers come, choose, move and go by the rules of `p2pswarm/placement`, on a simulated clock; the best arrangement is
computed for comparison. See docs/load-balancing.md.
"""

import argparse
import time
from pathlib import Path

from simulations.load_balancing.chart import chart
from simulations.load_balancing.experiment import QUICK_SIZES, SIZES, Cell, run_all
from simulations.load_balancing.page import line, page, tables

PAGE_PATH = Path("docs/load-balancing.md")
CHART_PATH = Path("docs/load-balancing.svg")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="up to 30 servers; writes nothing")
    flags = parser.parse_args()
    sizes = QUICK_SIZES if flags.quick else SIZES
    print(f"{__doc__.splitlines()[0]}\n\nseeds from 1 to {max(size.num_seeds for size in sizes)}\n")
    began_s = time.perf_counter()
    cells = run_all(sizes, _print)
    print(f"\n{tables(cells)}\n{time.perf_counter() - began_s:.0f} s of real time")
    if not flags.quick:
        PAGE_PATH.write_text(page(cells))
        CHART_PATH.write_text(chart(cells))
        print(f"written: {PAGE_PATH}, {CHART_PATH}")


def _print(cell: Cell) -> None:
    print(line(cell), flush=True)


if __name__ == "__main__":
    main()
