"""The shares as a picture: an SVG with a panel for each mixture, share of the optimum over the number of servers."""

import math
import statistics
from collections.abc import Sequence
from html import escape

from simulations.load_balancing.experiment import Cell
from simulations.load_balancing.machines import MIXTURES
from simulations.load_balancing.policies import Policy

COLORS = {
    Policy.NEVER: "#7a7a7a",
    Policy.PETALS: "#c1440e",
    Policy.EAGER: "#8fb8dc",
    Policy.SHIPPED: "#1f6fb2",
}
PANEL_WIDTH, PANEL_HEIGHT, MARGIN = 300, 220, 48
LOWEST_SHARE = 0.4
"""At the bottom; less is drawn there."""


def chart(cells: Sequence[Cell]) -> str:
    """Two panels a row; lines are means at rest, small circles single swarms of the policy as shipped."""
    sizes = sorted({cell.size.num_servers for cell in cells})
    num_rows = math.ceil(len(MIXTURES) / 2)
    width = 2 * (PANEL_WIDTH + MARGIN) + MARGIN
    height = num_rows * (PANEL_HEIGHT + 2 * MARGIN) + 20 * (len(COLORS) + 1)
    panels = []
    for number, mixture in enumerate(MIXTURES):
        left = MARGIN + number % 2 * (PANEL_WIDTH + MARGIN)
        top = MARGIN + number // 2 * (PANEL_HEIGHT + 2 * MARGIN)
        panels.append(_panel([cell for cell in cells if cell.mixture == mixture], mixture, sizes, left, top))
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
            'font-size="12">',
            f'<rect width="{width}" height="{height}" fill="white"/>',
            *panels,
            *_legend(num_rows * (PANEL_HEIGHT + 2 * MARGIN)),
            "</svg>\n",
        ]
    )


def _panel(cells: Sequence[Cell], mixture: str, sizes: Sequence[int], left: float, top: float) -> str:
    parts = [_text(left, top - 12, f"{mixture}: share of the optimum by number of servers")]
    for percent in range(40, 101, 20):
        y = _y(top, percent / 100)
        parts.append(f'<path d="M{left} {y:.1f}h{PANEL_WIDTH}" stroke="#ddd"/>')
        parts.append(_text(left - 34, y + 4, f"{percent}%"))
    parts += [_text(_x(left, sizes, size) - 8, top + PANEL_HEIGHT + 18, str(size)) for size in sizes]
    for policy, color in COLORS.items():
        drawn = [cell for cell in cells if cell.policy is policy and cell.shares]
        points = [(_x(left, sizes, cell.size.num_servers), _y(top, statistics.mean(cell.shares))) for cell in drawn]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{color}"/>' for x, y in points]
        if policy is Policy.SHIPPED:
            parts += [
                f'<circle cx="{_x(left, sizes, cell.size.num_servers):.1f}" cy="{_y(top, share):.1f}" r="5" '
                f'fill="none" stroke="{color}"/>'
                for cell in drawn
                for share in cell.shares
            ]
    return "\n".join(parts)


def _legend(top: float) -> list[str]:
    lines = [
        f'<circle cx="{MARGIN + 5}" cy="{top + 20 * index - 4}" r="4" fill="{color}"/>'
        + _text(MARGIN + 16, top + 20 * index, policy.value)
        for index, (policy, color) in enumerate(COLORS.items())
    ]
    return [*lines, _text(MARGIN, top + 20 * len(COLORS), "filled: mean at rest; hollow: each swarm, as shipped")]


def _x(left: float, sizes: Sequence[int], size: int) -> float:
    return left + 24 + sizes.index(size) * (PANEL_WIDTH - 48) / max(1, len(sizes) - 1)


def _y(top: float, share: float) -> float:
    return top + PANEL_HEIGHT * (1 - (max(share, LOWEST_SHARE) - LOWEST_SHARE) / (1 - LOWEST_SHARE))


def _text(x: float, y: float, text: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'
