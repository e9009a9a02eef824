"""One inference session: hidden states in, hidden states out, with a position that can go back.

Knows nothing of tokens beyond keeping their history for `client/generation.py`. Its servers are chosen at the first
step, when the batch size is known. Servers that fail are replaced within the step (2312.08361, Algorithm 1): who calls
`step` sees a pause, and the same answer. When it cannot be had within the time that `ClientConfig` gives, the step
raises and the session stays what it was before it: the same step may be tried again later.

Blocks that the client keeps are run before the first server and after the last one (`local_session.py`).

Read `chain.py` for how a step passes, `mending.py` for how servers are replaced, `recovery.py` for how long is tried.
"""

import itertools
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import trio

from p2pswarm.client.chain import Chain, Passage
from p2pswarm.client.config import ClientConfig
from p2pswarm.client.history import TokenHistory
from p2pswarm.client.input_history import Before, InputHistory
from p2pswarm.client.link import HopFailed, LinkTerms
from p2pswarm.client.local_blocks import LocalBlocks
from p2pswarm.client.local_session import LocalSession
from p2pswarm.client.mending import STEP_ID_STRIDE, Mender
from p2pswarm.client.model_servers import DTYPES, ModelServers
from p2pswarm.client.recovery import Recovery
from p2pswarm.client.step_input import StepInput, in_parts
from p2pswarm.client.tuning import Tuning
from p2pswarm.core.errors import ConfigError, MissingBlocksError, SessionClosed
from p2pswarm.routing.route import Route
from p2pswarm.rpc.client import RpcClient

logger = logging.getLogger(__name__)


class Session:
    """Made by `DistributedModel.session`; used by one task at a time. `nursery` holds its connections open."""

    def __init__(
        self,
        servers: ModelServers,
        rpc: RpcClient,
        config: ClientConfig,
        *,
        max_length: int,
        adapter: str | None = None,
        tuning: Tuning | None = None,
        prefix: torch.Tensor | None = None,
        nursery: trio.Nursery,
        local: LocalBlocks | None = None,
    ) -> None:
        """`adapter`: the id of one that servers announce. Of the tuning, the session keeps a copy: stand-ins are to
        compute what the servers did that they replace. `prefix` [virtual tokens, embedding size]: what the model puts
        in front of the text; its tokens are in no position or length here but those of steps. `local`: the blocks that
        are run here and not at servers."""
        if max_length < 1:
            raise ConfigError(f"a session's max_length is at least 1 token, got {max_length}")
        self.max_length = max_length
        if tuning is not None:
            tuning.check_fits(servers.facts.num_blocks, servers.facts.hidden_size)
        self.adapter = adapter
        self.tuning = None if tuning is None else tuning.detached()
        self.prefix = None if prefix is None else prefix.detach().clone()
        self.history: TokenHistory | None = None
        """The tokens behind the positions, where `generate` was used."""
        self.num_recoveries = 0
        """How often servers were replaced."""
        self._servers = servers
        self._rpc = rpc
        self._config = config
        self._nursery = nursery
        self._local = local
        self._running: _Running | None = None
        self._step_ids = itertools.count(STEP_ID_STRIDE, STEP_ID_STRIDE)
        self._num_virtual_tokens = 0 if prefix is None else prefix.shape[0]
        self._max_length_at_servers = max_length + self._num_virtual_tokens
        self._position = 0
        """Tokens in the servers' caches, virtual ones included."""
        self._is_stepping = False
        self._is_closed = False

    @property
    def position(self) -> int:
        """Tokens of the text in the servers' caches. Set it to a smaller number to go back: what came after is
        forgotten."""
        return max(0, self._position - self._num_virtual_tokens)

    @position.setter
    def position(self, position: int) -> None:
        if not 0 <= position <= self.position:
            raise ConfigError(f"a session's position only goes back: 0 to {self.position}, got {position}")
        self._position = position + self._num_virtual_tokens if position else 0
        if self.history is not None:
            self.history = self.history.cropped(position) if position else None

    def go_back_to(self, history: TokenHistory | None) -> None:
        """Forgets all but these tokens, which are the first ones of what has been run."""
        self.position = min(self.position, history.length if history is not None else 0)
        self.history = history

    @property
    def route(self) -> Route | None:
        """Its servers as of the last step; None before the first one."""
        return self._running.route if self._running is not None else None

    @property
    def num_rows(self) -> int | None:
        """Sequences in the servers' caches; None before the first step."""
        return self._running.terms.batch_size if self._running is not None else None

    async def step(self, step: StepInput) -> torch.Tensor:
        """The hidden states [batch, tokens, hidden] after the model's last block.

        Raises `MissingBlocksError` where blocks stay without a server, `RemoteError` or `NetworkError` naming the last
        server that failed when there were too many failures, `RequestRefused` when two servers, or the only one, find
        the step itself wrong, `SessionClosed` on a closed session. After an error, or cancelled, the session is at the
        step's position.
        """
        # A cancelled session's links close by themselves: what is raised then is the cancellation, not that they did.
        await trio.lowlevel.checkpoint_if_cancelled()
        self._check(step)
        with self._alone():
            running = self._running_for(step)
            before = running.before(step)
            try:
                parts = [await self._run_part(running, part) for part in in_parts(step, self._config.max_step_bytes)]
            except BaseException:
                running.give_up(step, before)
                if self._is_closed:
                    running.close()
                self._position = step.position
                raise
            return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def close(self) -> None:
        """Ends the session at all servers; further steps raise `SessionClosed`."""
        self._is_closed = True
        if self._running is not None:
            self._running.close()

    def _check_open(self) -> None:
        if self._is_closed:
            raise SessionClosed("this session is closed; open a new one")

    def _check(self, step: StepInput) -> None:
        self._check_open()
        step.check()
        hidden_size = self._servers.facts.hidden_size
        if step.hidden_states.shape[2] != hidden_size:
            raise ConfigError(
                f"a step takes hidden states [batch, tokens, {hidden_size}], got {list(step.hidden_states.shape)}"
            )
        if not 0 <= step.position <= self._position:
            raise ConfigError(f"the session is at position {self._position}, a step cannot start at {step.position}")
        if step.end > self._max_length_at_servers:
            before = max(0, step.position - self._num_virtual_tokens)
            raise ConfigError(
                f"{before} tokens and {step.end - self._num_virtual_tokens - before} new ones are more than the "
                f"session's max_length {self.max_length}; open one with a larger max_length"
            )

    @contextmanager
    def _alone(self) -> Iterator[None]:
        if self._is_stepping:
            raise ConfigError("two steps of one session at once; open a session for each")
        self._is_stepping = True
        try:
            yield
        finally:
            self._is_stepping = False

    def _running_for(self, step: StepInput) -> "_Running":
        """The chain and its history; new ones at first, and where a session that starts over changes its batch size."""
        running = self._running
        if running is not None and running.terms.batch_size != step.batch_size:
            if step.position > 0:
                raise ConfigError(
                    f"the session holds {running.terms.batch_size} sequences, the step has {step.batch_size}; "
                    "set session.position = 0 to start over, or open another session"
                )
            running.close()
            running = None
        if running is None:
            terms = LinkTerms(
                self._servers.facts.model_id,
                self._max_length_at_servers,
                step.batch_size,
                self._config.codec,
                self._config.alloc_timeout_s,
                self.adapter,
                self.tuning,
            )
            mender = Mender(self._servers, self._rpc, self._config, terms, self._nursery)
            self._running = running = _Running(self._servers, self._config, terms, mender, self._local)
        return running

    async def _run_part(self, running: "_Running", step: StepInput) -> torch.Tensor:
        self._position = step.position
        entering = step if running.local is None else await running.local.enter(step)
        passage = Passage(next(self._step_ids), entering, self._config.codec)
        running.history.begin(entering)
        output = await self._through(running, passage)
        running.history.commit(step.end)
        if running.local is not None:
            output = await running.local.leave(step, output)
        self._position = step.end
        return output

    async def _through(self, running: "_Running", passage: Passage) -> torch.Tensor:
        """Runs the step, on other servers where some fail."""
        recovery = Recovery(self._config)
        chain, started_at_s = running.chain, trio.current_time()
        while True:
            failures: list[HopFailed] = []
            try:
                filling_since_s = trio.current_time()
                failures = await running.mender.fill_gaps(chain, running.history, passage, recovery)
                if not failures:
                    recovery.do_not_count(trio.current_time() - filling_since_s)
                    self._check_open()
                    output = await chain.run(passage, running.history)
                    break
            except HopFailed as failed:
                failures = [failed]
            except MissingBlocksError as error:
                await self._wait_for_blocks(error, recovery, running)
            await self._note_failures(failures, recovery)
        route_before, running.route = running.route, Route(chain.hops)
        if recovery.num_failures and route_before is not None:
            self.num_recoveries += 1
            logger.info(
                "went on at position %d after %.2f s, by %s instead of %s; %s",
                passage.step.position,
                trio.current_time() - started_at_s,
                running.route,
                route_before,
                recovery.last_failure,
            )
        return output

    async def _note_failures(self, failures: Sequence[HopFailed], recovery: Recovery) -> None:
        self._check_open()
        for failed in failures:
            await self._servers.report_failure(failed.error, recovery)
        for failed in failures:
            recovery.after_failure(failed.error, failed.hop.span, trio.current_time())

    async def _wait_for_blocks(self, error: MissingBlocksError, recovery: Recovery, running: "_Running") -> None:
        """Waits until another try makes sense. Raises the error when it does not, or when the time is up."""
        self._check_open()
        if running.route is None and not self._servers.may_return(
            error.missing, self._max_length_at_servers, self.adapter
        ):
            raise recovery.explained(error)
        wait_s = recovery.wait_s(error, trio.current_time())
        if recovery.num_waits == 2:
            logger.warning("waiting up to %g s for servers: %s", self._config.recovery_timeout_s, error)
        await trio.sleep(wait_s)
        await self._servers.forgive(error.missing, recovery)


@dataclass(frozen=True, slots=True)
class _Before:
    """What a session was when a step began."""

    history: Before
    local: Before | None


class _Running:
    """What a session has while it runs: a chain of servers, what they were sent, and its share of the local blocks."""

    def __init__(
        self, servers: ModelServers, config: ClientConfig, terms: LinkTerms, mender: Mender, local: LocalBlocks | None
    ) -> None:
        self.terms = terms
        self.mender = mender
        self.local: LocalSession | None = None
        blocks = servers.facts.span
        if local is not None:
            self.local = LocalSession(local, terms.batch_size, terms.max_length, terms.tuning)
            blocks = local.remote
        self.chain = Chain(blocks, terms.codec, servers, config)
        dtype = None if config.history_dtype is None else DTYPES[config.history_dtype]
        self.history = InputHistory(terms.batch_size, terms.max_length, max_bytes=config.max_history_bytes, dtype=dtype)
        self.route: Route | None = None

    def close(self) -> None:
        self.chain.drop(self.chain.links)

    def before(self, step: StepInput) -> _Before:
        """For `give_up`."""
        return _Before(self.history.before(step), None if self.local is None else self.local.before(step))

    def give_up(self, step: StepInput, before: _Before) -> None:
        """Makes as if the step had never begun, but for going back to its position.

        Servers that still owe an answer are let go of: nobody knows what they hold. The others go back with the next
        step, unless rows changed places, which no later step can undo.
        """
        self.history.give_up(before.history)
        rows_moved = step.beam_indices is not None
        if self.local is not None and before.local is not None:
            self.local.give_up(before.local, rows_moved=rows_moved)
        self.chain.drop([link for link in self.chain.links if rows_moved or link.owes_an_answer])
