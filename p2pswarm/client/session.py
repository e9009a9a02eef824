"""One inference session: hidden states in, hidden states out, with a position that can go back.

Knows nothing of tokens beyond keeping their history for `client/generation.py`. Its servers are chosen at the first
step, when the batch size is known, and kept to the end. When one of them fails, the session is broken and says so:
nothing is ever answered from a part of its history.
"""

import secrets
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import trio

from p2pswarm.client.chain import Chain, open_chain
from p2pswarm.client.config import ClientConfig
from p2pswarm.client.history import TokenHistory
from p2pswarm.client.model_servers import ModelServers
from p2pswarm.client.single_error import single_error
from p2pswarm.client.step_input import StepInput, in_parts
from p2pswarm.core.errors import ConfigError, MissingBlocksError, NetworkError, RemoteError, SessionClosed
from p2pswarm.core.ids import SessionId
from p2pswarm.routing.planner import RouteRequest
from p2pswarm.routing.route import Route
from p2pswarm.rpc.client import RpcClient


class Session:
    """Made by `DistributedModel.session`; used by one task at a time. `nursery` holds its connections open."""

    def __init__(
        self, servers: ModelServers, rpc: RpcClient, config: ClientConfig, *, max_length: int, nursery: trio.Nursery
    ) -> None:
        if max_length < 1:
            raise ConfigError(f"a session's max_length is at least 1 token, got {max_length}")
        self.max_length = max_length
        self.history: TokenHistory | None = None
        """The tokens behind the positions, where `generate` was used."""
        self._servers = servers
        self._rpc = rpc
        self._config = config
        self._nursery = nursery
        self._chain: Chain | None = None
        self._position = 0
        self._is_stepping = False
        self._ended_by: str | None = None

    @property
    def position(self) -> int:
        """Tokens in the servers' caches. Set it to a smaller number to go back: what came after is forgotten."""
        return self._position

    @position.setter
    def position(self, position: int) -> None:
        if not 0 <= position <= self._position:
            raise ConfigError(f"a session's position only goes back: 0 to {self._position}, got {position}")
        self._position = position
        if self.history is not None:
            self.history = self.history.cropped(position) if position else None

    def go_back_to(self, history: TokenHistory | None) -> None:
        """Forgets all but these tokens, which are the first ones of what has been run."""
        self.history = history
        self._position = min(self._position, history.length if history is not None else 0)

    @property
    def route(self) -> Route | None:
        """Its servers; None before the first step."""
        return self._chain.route if self._chain is not None else None

    @property
    def num_rows(self) -> int | None:
        """Sequences in the servers' caches; None before the first step."""
        return self._chain.terms.batch_size if self._chain is not None else None

    async def step(self, step: StepInput) -> torch.Tensor:
        """The hidden states [batch, tokens, hidden] after the model's last block.

        Raises `RemoteError` or `NetworkError` naming the server and its blocks when one fails (the session is then
        broken), `SwarmError` when there is no route, `SessionClosed` on a broken session. It breaks when cancelled too.
        """
        self._check(step)
        with self._alone():
            chain = await self._chain_for(step)
            try:
                parts = [await chain.step(part) for part in in_parts(step, self._config.max_step_bytes)]
            except BaseException as error:
                self._end(f"is broken: {error}" if isinstance(error, Exception) else "was interrupted in a step")
                if isinstance(error, RemoteError | NetworkError):
                    self._servers.report_failure(error)
                raise
            self._position = step.position + step.num_tokens
            return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def close(self) -> None:
        """Ends the session at all servers; further steps raise `SessionClosed`."""
        self._end("is closed")

    def _end(self, why: str) -> None:
        self._ended_by = self._ended_by or why
        if self._chain is not None:
            self._chain.close()

    def _check(self, step: StepInput) -> None:
        if self._ended_by is not None:
            raise SessionClosed(f"this session {self._ended_by}; open a new one")
        hidden_size = self._servers.facts.hidden_size
        if step.hidden_states.ndim != 3 or step.hidden_states.shape[2] != hidden_size:
            raise ConfigError(
                f"a step takes hidden states [batch, tokens, {hidden_size}], got {list(step.hidden_states.shape)}"
            )
        if not 0 <= step.position <= self._position:
            raise ConfigError(f"the session is at position {self._position}, a step cannot start at {step.position}")
        if step.position + step.num_tokens > self.max_length:
            raise ConfigError(
                f"{step.position} tokens and {step.num_tokens} new ones are more than the session's max_length "
                f"{self.max_length}; open one with a larger max_length"
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

    async def _chain_for(self, step: StepInput) -> Chain:
        """The open chain; a new one where there is none or a session that starts over changes its batch size."""
        if self._chain is not None and self._chain.terms.batch_size != step.batch_size:
            if step.position > 0:
                raise ConfigError(
                    f"the session holds {self._chain.terms.batch_size} sequences, the step has {step.batch_size}; "
                    "set session.position = 0 to start over, or open another session"
                )
            self._chain.close()
            self._chain = None
        if self._chain is None:
            self._chain = await self._open(step.batch_size)
        return self._chain

    async def _open(self, batch_size: int) -> Chain:
        """Opens a chain over the best route; servers that fail or have no room are routed around, a few times."""
        request = RouteRequest(self._servers.facts.span, self.max_length, batch_size)
        failure: RemoteError | NetworkError | None = None
        for _ in range(self._config.max_open_attempts):
            try:
                route = await self._servers.route(request)
            except MissingBlocksError as error:
                if failure is None:
                    raise
                raise MissingBlocksError(f"{error}; the last failure: {failure}", error.missing) from failure
            terms = self._servers.chain_terms(route, request, SessionId(secrets.token_hex(16)))
            try:
                with single_error():
                    chain: Chain = await self._nursery.start(open_chain, self._rpc, route, terms, self._config)
                    return chain
            except (RemoteError, NetworkError) as error:
                failure = error
                request = self._servers.without_failed(request, error)
        assert failure is not None
        raise failure
