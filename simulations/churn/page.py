"""The results as a page of the documentation, and as lines for a terminal."""

from collections.abc import Mapping, Sequence

from simulations.churn.experiment import NUM_DRAWN, RATES, Cell
from simulations.churn.policies import Policy

PAPER: Mapping[tuple[Policy, int, float], str] = {
    (Policy.RESTARTS, 128, 1e-2): "0.18",
    (Policy.RESTARTS, 1024, 1e-3): "0.48",
    (Policy.RESTARTS, 1024, 1e-2): "did not finish",
    (Policy.ALGORITHM_1, 128, 1e-2): "3.38",
    (Policy.ALGORITHM_1, 1024, 1e-3): "7.76",
    (Policy.ALGORITHM_1, 1024, 1e-2): "2.17",
}
"""Steps/s in the paper's table (arXiv 2312.08361), as far as we could verify them."""

RATE_NAMES: Mapping[float, str] = {0.0: "0", 1e-4: "0.0001", 1e-3: "0.001", 1e-2: "0.01"}


INTRODUCTION = """# What failures cost

`python -m simulations.churn.run` writes this page. It asks the question of the failure table in the Petals paper
([arXiv 2312.08361](https://arxiv.org/abs/2312.08361)): how fast is a text made while servers fail in the middle of it?

## Method

- **The client is the real one**: sessions, failover, routing, calls and wire format of `p2pswarm`, over
  `MemoryNetwork`, on a simulated clock. Only the servers' work is simulated: each block is exact arithmetic in which
  every token depends on all tokens before it, and every text is compared with the true one. None was ever wrong.
- **The setting is the paper's**: 30 blocks of BLOOM-7.1B in four stages of 8, 7, 8 and 7, each stage on three servers,
  every link 1 Gbit/s and 1 ms one way. What a call takes is in `simulations/churn/setting.py`: four constants, fitted
  so that without failures caching makes 17.1 and 15.5 steps/s, for texts of 128 and 1024 tokens, and cache-less 3.44
  and 0.92. All else is outcome. (These four speeds are our starting point; we have not verified that they are the
  paper's own.)
- **A hand-over fails** with the probability in the table's head: there are five a step, from the client to the first
  stage, from stage to stage, and back to the client; replays and whole texts sent again are handed over like single
  tokens. The server's connections break, its caches are lost, and it is back at once, empty. Five, and restarts that
  cost little but their lost steps, are the reading under which restarts come out as in the paper.
- **Policies.** *Caching with restarts*: a failure loses the text, which begins again. *Cache-less*: each token sends
  the whole text through the servers once more. *Algorithm 1*: a session as this project ships it, with its bans, and
  with servers that push to each other; *relayed*: without push, which is how the plain policies work too. The client of
  the plain policies bans nobody, since bans could only make them wait.
- **Averages** over {num_seeds} seeds. Restarts repeat the same steps over and over: {num_drawn} such texts a cell are
  drawn from one that was run without failures and from tries that were run and lost (`simulations/churn/drawn.py`).
- **The paper's numbers** stand where we could verify them. Percentages say what is left of the same policy's speed
  without failures.

![Steps a second over failure rate](churn.svg)
"""


def line(cell: Cell) -> str:
    """The cell in a terminal."""
    low, high = cell.spread
    return (
        f"{cell.policy.value:22} {cell.num_tokens:5} tokens  failure rate {RATE_NAMES[cell.failure_rate]:6}"
        f"  {speed(cell):>14} steps/s  ({low:.2f} to {high:.2f}, {cell.num_failures:.1f} failures a text)"
    )


def speed(cell: Cell) -> str:
    if cell.part_finished == 0:
        return "did not finish"
    return f"{cell.steps_per_s:.1f}" if cell.steps_per_s >= 10 else f"{cell.steps_per_s:.2f}"


def tables(cells: Sequence[Cell]) -> str:
    """All that was found, in Markdown."""
    lengths = sorted({cell.num_tokens for cell in cells})
    parts = [f"## Steps a second, {num_tokens} tokens\n\n{_speed_table(cells, num_tokens)}\n" for num_tokens in lengths]
    parts += [
        f"## How many times as fast Algorithm 1 is\n\n{_ratio_table(cells)}\n",
        f"## Behind the averages\n\n{_detail_table(cells)}\n",
    ]
    return "\n".join(parts)


def _speed_table(cells: Sequence[Cell], num_tokens: int) -> str:
    lines = [_head("failure rate of a hand-over")]
    for policy in Policy:
        row = {cell.failure_rate: cell for cell in cells if cell.policy is policy and cell.num_tokens == num_tokens}
        fastest = row[0.0].steps_per_s
        lines.append(_row(policy.value, [f"{speed(row[rate])}{_share(row[rate], fastest)}" for rate in RATES]))
        paper = [PAPER.get((policy, num_tokens, rate), "") for rate in RATES]
        if any(paper):
            lines.append(_row("*the paper's*", [text and f"*{text}*" for text in paper]))
    return "\n".join(lines)


def _share(cell: Cell, fastest: float) -> str:
    if cell.failure_rate == 0 or cell.part_finished == 0:
        return ""
    share = cell.steps_per_s / fastest
    return f" ({share:.0%})" if share > 0.1 else f" ({share:.1%})"


def _ratio_table(cells: Sequence[Cell]) -> str:
    speeds = {(cell.policy, cell.num_tokens, cell.failure_rate): cell.steps_per_s for cell in cells}
    lines = [_head("as")]
    for num_tokens in sorted({cell.num_tokens for cell in cells}):
        for other in (Policy.RESTARTS, Policy.CACHE_LESS):
            pairs = [(speeds[Policy.ALGORITHM_1, num_tokens, rate], speeds[other, num_tokens, rate]) for rate in RATES]
            ratios = [f"{ours / theirs:.2g}" if theirs else "they never finish" for ours, theirs in pairs]
            lines.append(_row(f"{other.value}, {num_tokens} tokens", ratios))
    return "\n".join(lines)


def _detail_table(cells: Sequence[Cell]) -> str:
    lines = [
        "| | tokens | failure rate | steps/s, 10th to 90th percentile | failures a text | errors | finished in 1 h |",
        "|---|---|---|---|---|---|---|",
    ]
    for cell in cells:
        if cell.failure_rate > 0:
            low, high = cell.spread
            lines.append(
                _row(
                    cell.policy.value,
                    [
                        str(cell.num_tokens),
                        RATE_NAMES[cell.failure_rate],
                        f"{low:.2f} to {high:.2f}",
                        f"{cell.num_failures:.1f}",
                        str(cell.num_errors),
                        f"{cell.part_finished:.0%}",
                    ],
                )
            )
    return "\n".join(lines)


def _head(name: str) -> str:
    return _row(name, [RATE_NAMES[rate] for rate in RATES]) + "\n|---|" + "---|" * len(RATES)


def _row(name: str, texts: Sequence[str]) -> str:
    return f"| {name} | " + " | ".join(texts) + " |"


def page(cells: Sequence[Cell], num_seeds: int) -> str:
    """`docs/churn.md`."""
    return f"{INTRODUCTION.format(num_seeds=num_seeds, num_drawn=NUM_DRAWN)}\n{tables(cells)}"
