"""The results as a page of the documentation, and as lines for a terminal."""

import statistics
from collections.abc import Callable, Sequence

from simulations.load_balancing.experiment import (
    LIFETIME_S,
    MILP_TIME_LIMIT_S,
    MOST_SERVERS_EXACT,
    NUM_SAMPLES,
    SETTLING_S,
    Cell,
)
from simulations.load_balancing.machines import MIXTURES
from simulations.load_balancing.policies import SHIPPED_QUALITY, Policy
from simulations.load_balancing.world import Pace

INTRODUCTION = """# How well servers find their blocks

`python -m simulations.load_balancing.run` writes this page. Nobody tells servers which blocks to hold: each
chooses the window that is served worst when it comes, and looks now and then whether the swarm would be served
better if it moved. How far from the best arrangement do they end up, and how often do they move for it?

## Method

- **The rules are the real ones**, those of `p2pswarm/placement`; only announcements, loading and time are
  simulated. What a server knows of the others is up to {news_s:.0f} s old, a wish to move is announced
  {settling_s:.0f} s before it is acted on, a block takes {load_s:.0f} s to load, sessions have {grace_s:.0f} s
  to end, and checks come every {check_s:.0f} s on average, at random.
- **A swarm's throughput** is that of its worst block, the sum over the servers that hold it. **The optimum** is
  the best that the same servers could do wherever each had its blocks. Up to {most_exact} servers it is exact
  (mixed-integer programming, HiGHS; where {limit_s:.0f} s do not suffice, the bound that was proven by then);
  above, it is that of servers which can be divided, which no arrangement exceeds and hardly one of few servers
  reaches. So shares are understated, never overstated.
- **Each swarm grows** for an hour to its size, has {settle_min:.0f} minutes to come to rest, and then an hour
  in which nobody comes or goes. **Then it changes**: servers live {lifetime_h:.0f} hours on average, vanish
  without a word, and others come. At {samples} moments its share of the optimum is taken. Loading, a lost block
  that nobody has filled yet, all of that is in there.
- **Mixtures of machines.** *Alike*: all hold a quarter of the model. *Two kinds*: three in ten hold a third of
  it and are fast, the others hold a tenth. *Uneven*: from a twentieth to a half of the blocks, and speeds by a
  log-normal distribution, of machine and line (deviation 0.7). *Few giants*: speeds by a Pareto distribution
  (1.2), blocks by their square root.
- **Policies.** *{shipped}*: `--balance-quality {quality}`, which moves for a third more. *{eager}*: for a
  twentieth more. *{never}*: servers only choose when they come. *{petals}*: its `should_choose_other_blocks`,
  at {quality}, with our announcements.
- Swarms of which not even the best arrangement covers all blocks are left out.

![Share of the optimum](load-balancing.svg)
"""


def line(cell: Cell) -> str:
    """The cell in a terminal."""
    return (
        f"{cell.size.num_servers:5} servers  {cell.mixture:10}  {cell.policy.value:14}"
        f"  at rest {_mean(cell.shares):>5} of the optimum, worst {_worst(cell.shares):>5}"
        f"  moves {cell.mean(lambda run: run.num_moves):.1f}, then {cell.mean(lambda run: run.num_calm_moves):.1f}"
        f"  changing {_mean(cell.changing_shares):>5}"
    )


def tables(cells: Sequence[Cell]) -> str:
    """All that was found, in Markdown."""
    shipped = [cell for cell in cells if cell.policy is Policy.SHIPPED]
    at_rest = [share for cell in shipped for share in cell.shares]
    changing = [share for cell in shipped for share in cell.changing_shares]
    return "\n".join(
        [
            f"## In short\n\n{_summary(shipped, at_rest, changing)}\n",
            f"## At rest: mean share of the optimum, and the worst swarm's\n\n{_at_rest_table(cells)}\n",
            f"## While servers come and go: mean share, and that of servers then online\n\n{_changing_table(cells)}\n",
            f"## What it costs\n\n{_cost_table(cells)}\n",
        ]
    )


def _summary(shipped: Sequence[Cell], at_rest: Sequence[float], changing: Sequence[float]) -> str:
    below = [
        f"{cell.size.num_servers} servers, {cell.mixture} ({_mean(cell.shares)}, worst {_worst(cell.shares)})"
        for cell in shipped
        if cell.shares and statistics.mean(cell.shares) < 0.9
    ]
    num_calm_moves = sum(run.num_calm_moves for cell in shipped for run in cell.runs)
    num_runs = sum(len(cell.runs) for cell in shipped)
    lines = [
        f"- At rest, swarms have {_mean(at_rest)} of the optimum on average, over the {len(at_rest)} that can serve at "
        f"all; the worst has {_worst(at_rest)}.",
        f"- Below 90% on average: {'; '.join(below) or 'none'}.",
        f"- While servers come and go: {_mean(changing)} on average.",
        f"- In the calm hour, {num_runs} swarms made {num_calm_moves} moves.",
    ]
    return "\n".join(lines)


def _at_rest_table(cells: Sequence[Cell]) -> str:
    return _table(cells, lambda cell: f"{_mean(cell.shares)}, {_worst(cell.shares)}" if cell.shares else "")


def _changing_table(cells: Sequence[Cell]) -> str:
    return _table(
        [cell for cell in cells if cell.changing_shares],
        lambda cell: f"{_mean(cell.changing_shares)}, {_mean(cell.changing_shares_online)}",
    )


def _cost_table(cells: Sequence[Cell]) -> str:
    lines = [
        "| servers | machines | policy | moves while growing | in the calm hour | servers replaced | moves then | "
        "blocks reloaded | wishes withdrawn |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for cell in cells:
        if cell.policy is not Policy.NEVER:
            figures = [
                cell.mean(lambda run: run.num_moves),
                cell.mean(lambda run: run.num_calm_moves),
                cell.mean(lambda run: run.num_changes),
                cell.mean(lambda run: run.num_changing_moves),
                cell.mean(lambda run: run.num_blocks_reloaded),
                cell.mean(lambda run: run.num_withdrawn),
            ]
            texts = [f"{figure:.1f}" for figure in figures]
            lines.append(f"| {cell.size.num_servers} | {cell.mixture} | {cell.policy.value} | {' | '.join(texts)} |")
    return "\n".join(lines)


def _table(cells: Sequence[Cell], text: Callable[[Cell], str]) -> str:
    """A row for each size and policy, a column for each mixture."""
    lines = [f"| servers | policy | {' | '.join(MIXTURES)} |", "|---|---|" + "---|" * len(MIXTURES)]
    by_place = {(cell.size.num_servers, cell.policy, cell.mixture): cell for cell in cells}
    for num_servers, policy in dict.fromkeys((cell.size.num_servers, cell.policy) for cell in cells):
        row = [by_place.get((num_servers, policy, mixture)) for mixture in MIXTURES]
        texts = [text(cell) if cell is not None else "" for cell in row]
        lines.append(f"| {num_servers} | {policy.value} | {' | '.join(texts)} |")
    return "\n".join(lines)


def _mean(shares: Sequence[float]) -> str:
    return f"{statistics.mean(shares):.0%}" if shares else "-"


def _worst(shares: Sequence[float]) -> str:
    return f"{min(shares):.0%}" if shares else "-"


def page(cells: Sequence[Cell]) -> str:
    """`docs/load-balancing.md`."""
    pace = Pace()
    introduction = INTRODUCTION.format(
        news_s=pace.oldest_news_s,
        settling_s=pace.settling_s,
        load_s=pace.block_load_s,
        grace_s=pace.grace_period_s,
        check_s=pace.check_period_s,
        most_exact=MOST_SERVERS_EXACT,
        limit_s=MILP_TIME_LIMIT_S,
        settle_min=SETTLING_S / 60,
        lifetime_h=LIFETIME_S / 3600,
        samples=NUM_SAMPLES,
        shipped=Policy.SHIPPED.value.capitalize(),
        eager=Policy.EAGER.value.capitalize(),
        never=Policy.NEVER.value.capitalize(),
        petals=Policy.PETALS.value,
        quality=SHIPPED_QUALITY,
    )
    return f"{introduction}\n{tables(cells)}"
