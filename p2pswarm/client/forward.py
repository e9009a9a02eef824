"""A forward pass through the swarm without a session: nothing is remembered at the servers.

A server that fails costs its own blocks only: what went into them is still here, and goes on over another route.
"""

import torch
import trio

from p2pswarm.client.config import ClientConfig
from p2pswarm.client.link import at_hop, decode_finite
from p2pswarm.client.model_servers import ModelServers, dtype_of
from p2pswarm.client.recovery import Recovery
from p2pswarm.client.step_input import StepInput
from p2pswarm.core.errors import BadAnswer, ConfigError, MissingBlocksError, NetworkError, RemoteError, RequestRefused
from p2pswarm.core.span import Span
from p2pswarm.routing.planner import RouteMode, RouteRequest
from p2pswarm.routing.route import Hop
from p2pswarm.rpc.client import RpcClient
from p2pswarm.wire.codecs import encode_tensor
from p2pswarm.wire.messages import Forward


class ForwardPass:
    """Runs whole batches through all blocks, over servers drawn by their capacity, so that calls spread."""

    def __init__(self, servers: ModelServers, rpc: RpcClient, config: ClientConfig) -> None:
        self._servers = servers
        self._rpc = rpc
        self._config = config

    async def run(self, batch: StepInput, adapter: str | None = None) -> torch.Tensor:
        """The hidden states [batch, tokens, hidden] after the last block, through the adapter of that name or id or the
        config's. Raises as `Session.step` does, and `AdapterNotFound`."""
        if batch.position != 0:
            raise ConfigError(f"a forward pass without a cache starts at position 0, got {batch.position}")
        adapter_id = await self._servers.find_adapter(adapter)
        recovery = Recovery(self._config)
        hidden_states, done, end = batch.hidden_states, 0, self._servers.facts.num_blocks
        while done < end:
            request = RouteRequest(
                Span(done, end),
                avoided=frozenset(recovery.avoided),
                mode=RouteMode.MAX_THROUGHPUT,
                pushes=False,
                adapter=adapter_id,
            )
            try:
                route = await self._servers.route(request)
                dtypes = {hop: dtype_of(self._servers.known[hop.peer_id]) for hop in route.hops}
                for hop in route.hops:
                    hidden_states = await self._through(hop, hidden_states.to(dtypes[hop]), batch, adapter_id)
                    done = hop.span.end
            except (RemoteError, NetworkError) as error:
                self._servers.report_failure(error)
                recovery.after_failure(error, Span(done, end), trio.current_time())
            except MissingBlocksError as error:
                if recovery.last_failure is None and not self._servers.may_return(error.missing, 0, adapter_id):
                    raise
                await trio.sleep(recovery.wait_s(error, trio.current_time()))
                await self._servers.forgive(error.missing, recovery)
        return hidden_states.to(batch.hidden_states.dtype)

    async def _through(
        self, hop: Hop, hidden_states: torch.Tensor, batch: StepInput, adapter: str | None
    ) -> torch.Tensor:
        codec = self._config.codec
        request = Forward(
            self._servers.facts.model_id,
            hop.span,
            encode_tensor(hidden_states, codec),
            None if batch.attention_mask is None else encode_tensor(batch.attention_mask),
            None if batch.position_ids is None else encode_tensor(batch.position_ids),
            codec,
            adapter,
        )
        try:
            reply = await self._rpc.forward(hop.peer_id, request, self._config.timeout_s(batch.num_tokens_in_total))
            answer = decode_finite(reply.hidden_states, hop)
            if answer.shape != hidden_states.shape:
                raise BadAnswer(f"answered {list(answer.shape)} to {list(hidden_states.shape)}", hop.peer_id)
        except (RemoteError, NetworkError, RequestRefused) as error:
            raise at_hop(error, hop) from error
        return answer
