"""Greedy generations over server processes of which one in use is struck down every so often, compared with the local
model's.
"""

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
import trio

from p2pswarm.checkpoint.checkpoint import open_checkpoint
from p2pswarm.checkpoint.local_model import load_local_model
from p2pswarm.client.distributed_model import DistributedModel
from p2pswarm.client.generation import GeneratingSession
from p2pswarm.core.errors import SwarmingError
from simulations.failover.processes import Replica, Replicas

DEAD_S = 3.0
"""From SIGKILL to the start of the next process, which takes a few seconds more."""
STOPPED_S = 12.0
"""From SIGSTOP to SIGCONT; longer than anybody waits for an answer."""
TOKENS_UNTIL_FELT = 4
"""The step after a strike is the one that is late; a few tokens may have been on their way to the reader."""
SUBJECTS = ("a village by the sea", "the moon", "an old clock", "a lost dog", "winter", "a train", "two friends")
OPENINGS = ("Once upon a time, there was a story about", "Here is what I know about", "Explain to a child:")


class Strike(Enum):
    """What happens to a server."""

    KILL = "kill -9"
    STOP = "SIGSTOP"


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is generated, and how often a server is struck down."""

    num_generations: int
    num_tokens: int = 128
    tokens_between_strikes: int = 40
    """On average."""
    seed: int = 1


@dataclass(frozen=True, slots=True)
class Generation:
    """What one generation came to."""

    is_equal: bool
    num_strikes: int
    num_recoveries: int
    pauses_s: tuple[float, ...]
    """The longest wait for a token after each strike."""
    error: str | None


@dataclass(frozen=True, slots=True)
class Outcome:
    """All generations under one kind of strike."""

    strike: Strike
    generations: tuple[Generation, ...]

    @property
    def num_equal(self) -> int:
        return sum(generation.is_equal for generation in self.generations)

    @property
    def num_strikes(self) -> int:
        return sum(generation.num_strikes for generation in self.generations)

    @property
    def num_recoveries(self) -> int:
        return sum(generation.num_recoveries for generation in self.generations)

    @property
    def errors(self) -> list[str]:
        return [generation.error for generation in self.generations if generation.error is not None]

    @property
    def pauses_s(self) -> list[float]:
        """In rising order."""
        return sorted(pause_s for generation in self.generations for pause_s in generation.pauses_s)

    @property
    def is_perfect(self) -> bool:
        return self.num_equal == len(self.generations)

    def __str__(self) -> str:
        pauses_s = self.pauses_s or [0.0]
        return (
            f"{self.strike.value:8} {self.num_equal:3} of {len(self.generations):3} equal   "
            f"{self.num_strikes:3} strikes   {self.num_recoveries:3} recoveries   "
            f"pause median {statistics.median(pauses_s):5.2f} s, longest {pauses_s[-1]:5.2f} s   "
            f"{len(self.errors)} errors"
        )


def prompts(count: int) -> list[str]:
    """Different ones, as long as there are any."""
    return [f"{OPENINGS[index % len(OPENINGS)]} {SUBJECTS[index % len(SUBJECTS)]}" for index in range(count)]


def local_answers(model: str, plan: Plan) -> list[tuple[list[int], list[int]]]:
    """The prompts' token ids, and what the model in this process makes of them. Blocking."""
    checkpoint = open_checkpoint(model)
    local: Any = load_local_model(checkpoint)
    tokenizer = checkpoint.tokenizer()
    answers = []
    for prompt in prompts(plan.num_generations):
        token_ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        generated = local.generate(token_ids, **_options(plan))
        answers.append((token_ids[0].tolist(), generated[0, token_ids.shape[1] :].tolist()))
    return answers


def _options(plan: Plan) -> dict[str, Any]:
    return {"do_sample": False, "max_new_tokens": plan.num_tokens, "min_new_tokens": plan.num_tokens}


async def generate_all(
    model: DistributedModel,
    replicas: Replicas,
    answers: Sequence[tuple[list[int], list[int]]],
    strike: Strike,
    plan: Plan,
) -> Outcome:
    """One generation after the other, each in a session of its own."""
    async with trio.open_nursery() as nursery:
        attack = _Attack(strike, replicas, nursery, random.Random(plan.seed), plan.tokens_between_strikes)
        generations = [await _generate(model, attack, prompt, expected, plan) for prompt, expected in answers]
    await replicas.until_all_ready()
    return Outcome(strike, tuple(generations))


class _Attack:
    """Counts tokens and strikes a server of the session when it is time."""

    def __init__(
        self, strike: Strike, replicas: Replicas, nursery: trio.Nursery, randomness: random.Random, mean_tokens: int
    ) -> None:
        self._strike = strike
        self._replicas = replicas
        self._nursery = nursery
        self._random = randomness
        self._mean_tokens = mean_tokens
        self._tokens_left = self._draw()

    def _draw(self) -> int:
        return self._random.randint(self._mean_tokens * 3 // 4, self._mean_tokens * 5 // 4)

    def after_token(self, session: GeneratingSession) -> bool:
        """Whether a server was struck."""
        self._tokens_left -= 1
        if self._tokens_left > 0 or session.route is None:
            return False
        serving = [self._replicas[hop.peer_id] for hop in session.route.hops]
        alive = [replica for replica in serving if replica.is_ready]
        if not alive:
            return False
        self._tokens_left = self._draw()
        self._nursery.start_soon(self._hit, self._random.choice(alive))
        return True

    async def _hit(self, replica: Replica) -> None:
        match self._strike:
            case Strike.KILL:
                replica.kill()
                await trio.sleep(DEAD_S)
                await self._replicas.start(replica)
            case Strike.STOP:
                replica.pause()
                await trio.sleep(STOPPED_S)
                replica.go_on()


async def _generate(
    model: DistributedModel, attack: _Attack, prompt: list[int], expected: list[int], plan: Plan
) -> Generation:
    got: list[int] = []
    came_at_s: list[float] = []
    struck_after: list[int] = []
    error = None
    async with model.session(max_length=len(prompt) + plan.num_tokens) as session:
        try:
            async for token_id in session.generate(prompt, **_options(plan)):
                got.append(token_id)
                came_at_s.append(trio.current_time())
                if len(got) < plan.num_tokens and attack.after_token(session):
                    struck_after.append(len(got) - 1)
        except SwarmingError as failure:
            error = f"{type(failure).__name__}: {failure}"
        num_recoveries = session.num_recoveries
    return Generation(got == expected, len(struck_after), num_recoveries, _pauses_s(came_at_s, struck_after), error)


def _pauses_s(came_at_s: Sequence[float], struck_after: Sequence[int]) -> tuple[float, ...]:
    gaps_s = torch.tensor(came_at_s, dtype=torch.float64).diff()
    felt_s = [gaps_s[index : index + TOKENS_UNTIL_FELT] for index in struck_after]
    return tuple(float(gaps.max()) for gaps in felt_s if len(gaps))
