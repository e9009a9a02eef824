"""How long the next token takes after a server was struck down, far into a text, beside one prefill of its span."""

import secrets
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import trio

from p2pswarm.client.distributed_model import DistributedModel
from p2pswarm.client.swarm import Swarm
from p2pswarm.core.ids import SessionId
from p2pswarm.core.span import Span
from p2pswarm.wire.codecs import encode_tensor
from p2pswarm.wire.messages import OpenSession, Step
from simulations.failover.generations import Strike
from simulations.failover.processes import Replica, Replicas

FIRST_TOKENS = 6
"""Generated before the strike: the step deadline then knows how fast the servers are."""
MORE_TOKENS = 6
NUM_PREFILLS = 3
PREFILL_TIMEOUT_S = 60.0
ALLOWED_PREFILLS, ALLOWED_S = 1.5, 0.5


@dataclass(frozen=True, slots=True)
class RecoveryCost:
    """One strike."""

    strike: Strike
    span: Span
    prefill_s: float
    """One prefill of the whole history through the lost span, at a server with nothing else to do."""
    next_token_s: float
    step_deadline_s: float
    """What is waited for an answer of a server that may hang; 0 where the connection breaks at once."""

    @property
    def allowed_s(self) -> float:
        return self.step_deadline_s + ALLOWED_PREFILLS * self.prefill_s + ALLOWED_S

    @property
    def is_allowed(self) -> bool:
        return self.next_token_s <= self.allowed_s

    def __str__(self) -> str:
        return (
            f"{self.strike.value:8} blocks {self.span!s:6} prefill {self.prefill_s:.2f} s, next token after "
            f"{self.next_token_s:.2f} s, allowed {self.allowed_s:.2f} s: {'kept' if self.is_allowed else 'MISSED'}"
        )


async def measure_recovery(
    swarm: Swarm,
    model: DistributedModel,
    replicas: Replicas,
    strike: Strike,
    span: Span,
    *,
    position: int,
    step_deadline_s: float,
) -> RecoveryCost:
    """Strikes the server of `span` when the session has come to `position`; afterwards all servers are well again."""
    token_ids = list(range(20, 20 + position - FIRST_TOKENS))
    options: dict[str, Any] = {"do_sample": False, "eos_token_id": None}
    async with model.session(max_length=position + MORE_TOKENS) as session:
        async for _ in session.generate(token_ids, max_new_tokens=FIRST_TOKENS, **options):
            pass
        assert session.route is not None
        (hop,) = (hop for hop in session.route.hops if hop.span == span)
        struck = replicas[hop.peer_id]
        (stand_in,) = (replica for replica in replicas.all if replica.span == span and replica is not struck)
        prefill_s = await _prefill_s(swarm, model, stand_in, session.position)
        struck_at_s = trio.current_time()
        struck.kill() if strike is Strike.KILL else struck.pause()
        tokens = session.generate(max_new_tokens=MORE_TOKENS, **options)
        await anext(aiter(tokens))
        next_token_s = trio.current_time() - struck_at_s
        async for _ in tokens:
            pass
    if strike is Strike.KILL:
        await replicas.start(struck)
    else:
        struck.go_on()
    return RecoveryCost(strike, span, prefill_s, next_token_s, step_deadline_s if strike is Strike.STOP else 0.0)


async def _prefill_s(swarm: Swarm, model: DistributedModel, replica: Replica, num_tokens: int) -> float:
    """The time that the server takes for so many tokens at once; the median of a few."""
    assert replica.peer_id is not None
    hidden_states = await trio.to_thread.run_sync(partial(_some_hidden_states, model, num_tokens))
    swarm.network.add_addresses(replica.peer_id, replica.addresses)
    times_s = [await _time_prefill(swarm, model, replica, hidden_states) for _ in range(NUM_PREFILLS)]
    return statistics.median(times_s)


def _some_hidden_states(model: DistributedModel, num_tokens: int) -> torch.Tensor:
    return torch.randn(1, num_tokens, model.servers.facts.hidden_size, generator=torch.Generator().manual_seed(1))


async def _time_prefill(swarm: Swarm, model: DistributedModel, replica: Replica, hidden_states: torch.Tensor) -> float:
    num_tokens = hidden_states.shape[1]
    request = OpenSession(SessionId(secrets.token_hex(16)), model.model_id, replica.span, num_tokens, 1)
    assert replica.peer_id is not None
    async with swarm.rpc.open_session(replica.peer_id, request, PREFILL_TIMEOUT_S) as session:
        began_s = trio.current_time()
        await session.step(Step(0, 0, encode_tensor(hidden_states)), PREFILL_TIMEOUT_S)
        return trio.current_time() - began_s


def all_allowed(costs: Sequence[RecoveryCost]) -> bool:
    return all(cost.is_allowed for cost in costs)
