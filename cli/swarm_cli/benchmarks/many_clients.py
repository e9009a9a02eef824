"""`swarm bench --clients 1,2,4,8,16`: how many tokens a second do N clients get together, and are they the right ones?

Each client has a session, a prompt and a prompt length of its own. All take their prompts and first tokens; then all
decode at once. Counted are the tokens that come from then until the first client has all of its own, so that N clients
decode all the while. The numbers of clients take turns, round by round, beside one client alone; medians of the rounds
after one that does not count.

The clients are sessions of this process, which share one model head, as those of a program with many users do;
with `--client-processes` each is a process, which has to read a head of its own for each token.
"""

import argparse
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any

import trio
from rich.table import Table

from p2pswarm.core.errors import ConfigError
from p2pswarm.rpc.limits import DEFAULT_RPC_LIMITS
from swarm_cli.benchmarks.clients import Client, Decoded, SessionClient, Task, open_client_processes
from swarm_cli.benchmarks.generating import SHORT_PROMPT_TOKENS, Measured, generate_locally, make_prompt
from swarm_cli.benchmarks.setting import Setting

PROMPT_LENGTHS = 16
"""The prompts' lengths are the first so many multiples of `SHORT_PROMPT_TOKENS`, in turn."""


@dataclass(frozen=True, slots=True)
class RoundOfClients:
    """What clients that decoded at the same time got."""

    tokens_per_s: float
    """Of all together, while all decoded."""
    tokens_per_s_of_each: tuple[float, ...]
    token_ids: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class ManyClientsReport:
    """What the benchmark says."""

    rounds_of: dict[int, list[RoundOfClients]]
    """By the number of clients."""
    local: tuple[Measured, ...]
    """The local model's answers to the clients' prompts."""
    are_processes: bool

    @property
    def one_client_tokens_per_s(self) -> float:
        return self.tokens_per_s(1)

    @property
    def local_tokens_per_s(self) -> float:
        return 1 / median(measured.decode_s_per_token for measured in self.local)

    def tokens_per_s(self, num_clients: int) -> float:
        return median(one.tokens_per_s for one in self.rounds_of[num_clients])

    def slowest_tokens_per_s(self, num_clients: int) -> float:
        """Of the client that got least."""
        return median(min(one.tokens_per_s_of_each) for one in self.rounds_of[num_clients])

    def are_exact(self, num_clients: int) -> list[bool]:
        """Of each client: whether its tokens were the local model's, in all rounds."""
        return [
            all(one.token_ids[number] == self.local[number].token_ids for one in self.rounds_of[num_clients])
            for number in range(num_clients)
        ]

    def as_json(self) -> dict[str, Any]:
        return {
            "clients_are": self._clients_are,
            "local_tokens_per_s": round(self.local_tokens_per_s, 2),
            "clients": [
                {
                    "num_clients": number,
                    "tokens_per_s": round(self.tokens_per_s(number), 2),
                    "over_one_client": round(self.tokens_per_s(number) / self.one_client_tokens_per_s, 3),
                    "slowest_client_tokens_per_s": round(self.slowest_tokens_per_s(number), 2),
                    "are_exact": self.are_exact(number),
                }
                for number in sorted(self.rounds_of)
            ],
            "rounds": len(self.rounds_of[1]),
        }

    def as_table(self) -> Table:
        table = Table(
            caption=f"the clients are {self._clients_are}; the local model alone: {self.local_tokens_per_s:.1f} "
            f"tokens/s; medians of {len(self.rounds_of[1])} rounds",
        )
        for column in ("clients", "tokens/s together", ": one client", "slowest client", "exact"):
            table.add_column(column, justify="right")
        for number in sorted(self.rounds_of):
            are_exact = self.are_exact(number)
            table.add_row(
                str(number),
                f"{self.tokens_per_s(number):.1f}",
                f"{self.tokens_per_s(number) / self.one_client_tokens_per_s:.2f}",
                f"{self.slowest_tokens_per_s(number):.1f}",
                "yes" if all(are_exact) else f"NO: {are_exact.count(False)} clients are not",
            )
        return table

    @property
    def _clients_are(self) -> str:
        return "processes" if self.are_processes else "sessions of one process"


async def measure(setting: Setting, arguments: argparse.Namespace) -> ManyClientsReport:
    """All numbers of clients in turn, round by round; then the local model, for the truth."""
    numbers = sorted({1, *arguments.clients})
    tasks = [Task(client_prompt(number), arguments.new_tokens) for number in range(numbers[-1])]
    rounds_of: dict[int, list[RoundOfClients]] = {number: [] for number in numbers}
    async with _open_clients(setting, numbers[-1], arguments.client_processes) as clients:
        for round_number in range(arguments.rounds + 1):
            setting.say_round(round_number, arguments.rounds)
            for number in numbers:
                measured = await _decode_together(clients[:number], tasks[:number])
                if round_number > 0:
                    rounds_of[number].append(measured)
    setting.console.print("[dim]the local model[/]")
    local = [
        await generate_locally(setting.local.generate, task.prompt_ids, 1 + task.new_tokens)
        for task in [tasks[0], *tasks]
    ]
    return ManyClientsReport(rounds_of, tuple(local[1:]), arguments.client_processes)


def client_prompt(number: int) -> list[int]:
    """That of the client of this number: different tokens, and so many that neighbours differ in length."""
    return make_prompt(SHORT_PROMPT_TOKENS * (1 + number % PROMPT_LENGTHS), number)


@asynccontextmanager
async def _open_clients(setting: Setting, num_clients: int, as_processes: bool) -> AsyncIterator[list[Client]]:
    if as_processes:
        setting.console.print(f"Starting {num_clients} client processes …")
        async with open_client_processes(setting, num_clients) as clients:
            yield clients
        return
    most = DEFAULT_RPC_LIMITS.max_sessions_per_peer
    if num_clients > most:
        raise ConfigError(f"a server takes {most} sessions of one peer, not {num_clients}: add --client-processes")
    yield [SessionClient(setting.model) for _ in range(num_clients)]


async def _decode_together(clients: Sequence[Client], tasks: Sequence[Task]) -> RoundOfClients:
    start = StartTogether(len(clients))
    decoded: dict[int, Decoded] = {}

    async def decode(number: int) -> None:
        decoded[number] = await clients[number].decode(tasks[number], start.wait)

    async with trio.open_nursery() as nursery:
        for number in range(len(clients)):
            nursery.start_soon(decode, number)
    return summarize([decoded[number] for number in range(len(clients))], start.started_at_s)


def summarize(decoded: Sequence[Decoded], started_at_s: float) -> RoundOfClients:
    """Counts what came until the first client had all its tokens."""
    until_s = min(one.came_at_s[-1] for one in decoded)
    num_tokens = sum(came_at_s <= until_s for one in decoded for came_at_s in one.came_at_s)
    return RoundOfClients(
        tokens_per_s=num_tokens / (until_s - started_at_s),
        tokens_per_s_of_each=tuple(len(one.came_at_s) / (one.came_at_s[-1] - started_at_s) for one in decoded),
        token_ids=tuple(tuple(one.token_ids) for one in decoded),
    )


class StartTogether:
    """Lets all go on when the last one waits."""

    def __init__(self, num_waiting: int) -> None:
        self._num_missing = num_waiting
        self._all_are_here = trio.Event()
        self.started_at_s = 0.0
        """By `time.perf_counter`."""

    async def wait(self) -> None:
        self._num_missing -= 1
        if self._num_missing == 0:
            self.started_at_s = perf_counter()
            self._all_are_here.set()
        await self._all_are_here.wait()
