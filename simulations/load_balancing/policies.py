"""When servers move: never, by the rule that `swarmd` ships, or by that of Petals, for comparison."""

import math
from collections.abc import Mapping
from dataclasses import replace
from enum import Enum
from random import Random

import numpy as np

from p2pswarm.core.ids import PeerId
from p2pswarm.core.server_info import ServerInfo
from p2pswarm.core.span import Span
from p2pswarm.placement.rebalancing import Move, should_move
from p2pswarm.placement.throughput import block_throughputs, counted_throughputs
from p2pswarm.placement.windows import worst_window
from simulations.load_balancing.world import Decide

SHIPPED_QUALITY = 0.75
EAGER_QUALITY = 0.95
PETALS_BIAS = 1e-3
MAX_PETALS_ROUNDS = 50


class Policy(Enum):
    """By their names in the tables."""

    NEVER = "nobody moves"
    SHIPPED = "as shipped"
    EAGER = f"quality {EAGER_QUALITY}"
    PETALS = "Petals' rule"


def decider(policy: Policy, random: Random) -> Decide:
    """The decision that a server makes at each check."""
    match policy:
        case Policy.NEVER:
            return lambda own, seen: None
        case Policy.SHIPPED:
            return _Shipped(SHIPPED_QUALITY)
        case Policy.EAGER:
            return _Shipped(EAGER_QUALITY)
        case Policy.PETALS:
            return lambda own, seen: _petals_move(own, seen, random)


class _Shipped:
    """The daemon's rule; who sees exactly what it saw the last time is not asked again."""

    def __init__(self, balance_quality: float) -> None:
        self._balance_quality = balance_quality
        self._answers: dict[PeerId, tuple[ServerInfo, Mapping[PeerId, ServerInfo], Move | None]] = {}

    def __call__(self, own: ServerInfo, seen: Mapping[PeerId, ServerInfo]) -> Move | None:
        last = self._answers.get(own.peer_id)
        if last is not None and last[0] is own and last[1] is seen:
            return last[2]
        move = should_move(own, seen.values(), self._balance_quality)
        self._answers[own.peer_id] = own, seen, move
        return move


def _petals_move(own: ServerInfo, seen: Mapping[PeerId, ServerInfo], random: Random) -> Move | None:
    """`should_choose_other_blocks` of Petals: to the worst-served window, if that and what follows helps enough.

    What follows is tried out: all servers in random order take the window that is worst served without them, until
    nobody wants another. Neither the move itself nor what others do in the meantime is looked at.
    """
    own = replace(own, next_span=None)
    seen = {**seen, own.peer_id: own}  # where it is, not where it has announced that it would like to be
    counted = [(server.peer_id, span, value) for server, span, value in counted_throughputs(seen.values())]
    spans = {peer_id: span for peer_id, span, _ in counted}
    throughputs = {peer_id: value for peer_id, _, value in counted}
    blocks = np.array(block_throughputs(own.num_model_blocks, seen.values()))
    before = float(blocks.min())
    choice = _choice(blocks, spans, throughputs, own.peer_id)
    blocks_without = blocks.copy()
    _add(blocks_without, own.span, -throughputs[own.peer_id])
    if choice == own.span or (before > 0 and blocks_without.min() <= 0):
        return None
    _move(blocks, spans, throughputs, own.peer_id, choice)
    order = sorted(spans)
    for _ in range(MAX_PETALS_ROUNDS):
        random.shuffle(order)
        moves = [_move(blocks, spans, throughputs, i, _choice(blocks, spans, throughputs, i)) for i in order]
        if not any(moves):
            break
    after = float(blocks.min())
    if after <= before or before >= (SHIPPED_QUALITY - PETALS_BIAS) * after:
        return None
    return Move(choice, after / before if before else math.inf)


def _choice(
    blocks: np.ndarray, spans: Mapping[PeerId, Span], throughputs: Mapping[PeerId, float], peer_id: PeerId
) -> Span:
    without = blocks.copy()
    _add(without, spans[peer_id], -throughputs[peer_id] * (1 + PETALS_BIAS))
    num_blocks = spans[peer_id].num_blocks
    start = worst_window(without, num_blocks)
    return Span(start, start + num_blocks)


def _move(
    blocks: np.ndarray, spans: dict[PeerId, Span], throughputs: Mapping[PeerId, float], peer_id: PeerId, span: Span
) -> bool:
    has_moved = span != spans[peer_id]
    if has_moved:
        _add(blocks, spans[peer_id], -throughputs[peer_id])
        _add(blocks, span, throughputs[peer_id])
        spans[peer_id] = span
    return has_moved


def _add(blocks: np.ndarray, span: Span, throughput: float) -> None:
    blocks[span.start : span.end] += throughput
