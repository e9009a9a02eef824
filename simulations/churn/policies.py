"""The policies of the paper's table, all by the real client: each makes a text of so many tokens, whatever fails."""

from dataclasses import dataclass, field
from enum import Enum
from typing import assert_never

import trio

from p2pswarm.client.config import ClientConfig
from p2pswarm.client.session import Session
from p2pswarm.client.step_input import StepInput
from p2pswarm.core.errors import NetworkError, RemoteError, SwarmError
from simulations.churn.stage_model import FIRST_TOKEN, embedded, next_token
from simulations.churn.world import World

FAILURES = (RemoteError, NetworkError, SwarmError)
SHORT_BAN_S = 0.001
TRY_AGAIN_AFTER_S = 0.01
"""Where the client gives up, its user tries once more; an error that takes no time must not stop the clock."""


class Policy(Enum):
    """What is done about failures."""

    RESTARTS = "caching with restarts"
    """Servers keep caches; a failure loses them, and the text begins again from its first token."""
    CACHE_LESS = "cache-less"
    """Nothing is kept: every token sends the whole text through the servers once more."""
    ALGORITHM_1 = "Algorithm 1"
    """A `client.session.Session` as it is shipped."""
    RELAYED = "Algorithm 1, relayed"
    """The same without push between servers: the client hands on, as it does for the plain policies."""

    @property
    def config(self) -> ClientConfig:
        """Of its client. Those of the plain policies ban nobody to speak of: that could only make them wait."""
        match self:
            case Policy.RESTARTS:
                return ClientConfig(known_peers_path=None, use_push=False, ban_s=SHORT_BAN_S, max_retries=0)
            case Policy.CACHE_LESS:
                return ClientConfig(known_peers_path=None, use_push=False, ban_s=SHORT_BAN_S)
            case Policy.ALGORITHM_1:
                return ClientConfig(known_peers_path=None)
            case Policy.RELAYED:
                return ClientConfig(known_peers_path=None, use_push=False)


@dataclass
class Progress:
    """How far a generation has come."""

    max_steps: int | None = None
    """Where to stop it; None: at the end."""
    num_steps: int = 0
    """Tokens of all tries."""
    began_at_s: float = field(default_factory=trio.current_time)
    """The try that is under way; all but the first begin after a restart."""
    tokens: list[int] = field(default_factory=list)
    token_times_s: list[float] = field(default_factory=list)
    """When each token came, from the beginning of its try."""
    lost_tries: list["LostTry"] = field(default_factory=list)
    num_errors: int = 0
    """Failures that came out of the client, where restarts are not the answer to them."""

    def may_go_on(self, num_tokens: int) -> bool:
        return len(self.tokens) < num_tokens and self.num_steps != self.max_steps

    def add(self, token: int) -> None:
        self.num_steps += 1
        self.tokens.append(token)
        self.token_times_s.append(trio.current_time() - self.began_at_s)

    def start_over(self) -> None:
        self.lost_tries.append(LostTry(len(self.tokens), trio.current_time() - self.began_at_s))
        self.began_at_s = trio.current_time()
        self.tokens.clear()
        self.token_times_s.clear()


@dataclass(frozen=True, slots=True)
class LostTry:
    """What a restart throws away."""

    num_tokens: int
    elapsed_s: float
    """Until the failure was noticed."""


async def generate(policy: Policy, world: World, num_tokens: int, progress: Progress) -> None:
    """Makes the text token by token, and writes down how it goes."""
    match policy:
        case Policy.RESTARTS:
            while progress.may_go_on(num_tokens):
                await _try_once(world, num_tokens, progress)
        case Policy.CACHE_LESS:
            await _run_all_again_and_again(world, num_tokens, progress)
        case Policy.ALGORITHM_1 | Policy.RELAYED:
            await _in_one_session(world, num_tokens, progress)
        case _:
            assert_never(policy)


async def _try_once(world: World, num_tokens: int, progress: Progress) -> None:
    session = world.session(num_tokens)
    try:
        await _decode(session, num_tokens, progress)
    except FAILURES:
        progress.start_over()
    finally:
        session.close()


async def _in_one_session(world: World, num_tokens: int, progress: Progress) -> None:
    session = world.session(num_tokens)
    try:
        while progress.may_go_on(num_tokens):
            try:
                await _decode(session, num_tokens, progress)
            except FAILURES:
                progress.num_errors += 1
                await trio.sleep(TRY_AGAIN_AFTER_S)
    finally:
        session.close()


async def _decode(session: Session, num_tokens: int, progress: Progress) -> None:
    while progress.may_go_on(num_tokens):
        token = progress.tokens[-1] if progress.tokens else FIRST_TOKEN
        progress.add(next_token(await session.step(StepInput(embedded([token]), session.position))))


async def _run_all_again_and_again(world: World, num_tokens: int, progress: Progress) -> None:
    forward_pass = world.forward_pass()
    while progress.may_go_on(num_tokens):
        text = embedded([FIRST_TOKEN, *progress.tokens])
        try:
            progress.add(next_token(await forward_pass.run(StepInput(text, 0))))
        except FAILURES:
            progress.num_errors += 1
            await trio.sleep(TRY_AGAIN_AFTER_S)
