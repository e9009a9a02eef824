"""The speeds as a picture: an SVG with a panel for each length, speed over failure rate, both logarithmic."""

import math
from collections.abc import Sequence
from html import escape

from simulations.churn.experiment import RATES, Cell
from simulations.churn.page import PAPER, RATE_NAMES
from simulations.churn.policies import Policy

COLORS = {
    Policy.RESTARTS: "#c1440e",
    Policy.CACHE_LESS: "#7a7a7a",
    Policy.RELAYED: "#8fb8dc",
    Policy.ALGORITHM_1: "#1f6fb2",
}
PANEL_WIDTH, PANEL_HEIGHT, MARGIN = 300, 260, 48
SLOWEST, FASTEST = 0.1, 30.0
"""Steps/s at the bottom and at the top."""


def chart(cells: Sequence[Cell]) -> str:
    """One panel for each length; filled points are ours, hollow ones the paper's."""
    lengths = sorted({cell.num_tokens for cell in cells})
    width = len(lengths) * (PANEL_WIDTH + MARGIN) + MARGIN
    height = PANEL_HEIGHT + 2 * MARGIN + 20 * (len(Policy) + 1)
    panels = [
        _panel([cell for cell in cells if cell.num_tokens == num_tokens], MARGIN + index * (PANEL_WIDTH + MARGIN))
        for index, num_tokens in enumerate(lengths)
    ]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
            'font-size="12">',
            f'<rect width="{width}" height="{height}" fill="white"/>',
            *panels,
            *_legend(),
            "</svg>\n",
        ]
    )


def _panel(cells: Sequence[Cell], left: float) -> str:
    num_tokens = cells[0].num_tokens
    parts = [_text(left, MARGIN - 12, f"{num_tokens} tokens: steps/s by failure rate of a hand-over")]
    for speed in (0.1, 0.3, 1, 3, 10, 30):
        y = _y(speed)
        parts.append(f'<path d="M{left} {y:.1f}h{PANEL_WIDTH}" stroke="#ddd"/>')
        parts.append(_text(left - 26, y + 4, f"{speed:g}"))
    parts += [_text(_x(left, rate) - 8, MARGIN + PANEL_HEIGHT + 18, RATE_NAMES[rate]) for rate in RATES]
    for policy, color in COLORS.items():
        points = [
            (_x(left, cell.failure_rate), _y(cell.steps_per_s))
            for cell in cells
            if cell.policy is policy and cell.part_finished > 0
        ]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{color}"/>' for x, y in points]
        parts += [
            f'<circle cx="{_x(left, rate):.1f}" cy="{_y(float(text)):.1f}" r="5" fill="none" stroke="{color}"/>'
            for (paper_policy, length, rate), text in PAPER.items()
            if paper_policy is policy and length == num_tokens and text[0].isdigit()
        ]
    return "\n".join(parts)


def _legend() -> list[str]:
    top = MARGIN + PANEL_HEIGHT + 44
    lines = [
        f'<circle cx="{MARGIN + 5}" cy="{top + 20 * index - 4}" r="4" fill="{color}"/>'
        + _text(MARGIN + 16, top + 20 * index, policy.value)
        for index, (policy, color) in enumerate(COLORS.items())
    ]
    note = "hollow: the paper's; a line that ends: no text was finished in an hour"
    return [*lines, _text(MARGIN, top + 20 * len(COLORS), note)]


def _x(left: float, rate: float) -> float:
    return left + 24 + RATES.index(rate) * (PANEL_WIDTH - 48) / (len(RATES) - 1)


def _y(speed: float) -> float:
    height = (math.log(speed) - math.log(SLOWEST)) / (math.log(FASTEST) - math.log(SLOWEST))
    return MARGIN + PANEL_HEIGHT * (1 - max(0.0, height))


def _text(x: float, y: float, text: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'
