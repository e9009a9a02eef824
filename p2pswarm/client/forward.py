"""A forward pass through the swarm without a session: nothing is remembered, so a failed try is simply made again."""

import torch

from p2pswarm.client.chain import at_hop, decode_finite
from p2pswarm.client.config import ClientConfig
from p2pswarm.client.model_servers import ModelServers
from p2pswarm.client.step_input import StepInput
from p2pswarm.core.errors import BadAnswer, ConfigError, NetworkError, RemoteError, RequestRefused
from p2pswarm.routing.planner import RouteRequest
from p2pswarm.routing.route import Hop
from p2pswarm.rpc.client import RpcClient
from p2pswarm.wire.codecs import encode_tensor
from p2pswarm.wire.messages import Forward


class ForwardPass:
    """Runs whole batches through all blocks, over the best route each time."""

    def __init__(self, servers: ModelServers, rpc: RpcClient, config: ClientConfig) -> None:
        self._servers = servers
        self._rpc = rpc
        self._config = config

    async def run(self, batch: StepInput) -> torch.Tensor:
        """The hidden states [batch, tokens, hidden] after the last block. Tries other servers when one fails."""
        if batch.position != 0:
            raise ConfigError(f"a forward pass without a cache starts at position 0, got {batch.position}")
        request = RouteRequest(self._servers.facts.span)
        failure: RemoteError | NetworkError | None = None
        for _ in range(self._config.max_open_attempts):
            route = await self._servers.route(request)
            dtypes = self._servers.dtypes(route)
            try:
                hidden_states = batch.hidden_states
                for hop in route.hops:
                    hidden_states = await self._through(hop, hidden_states.to(dtypes[hop.peer_id]), batch)
                return hidden_states.to(batch.hidden_states.dtype)
            except (RemoteError, NetworkError) as error:
                failure = error
                request = self._servers.without_failed(request, error)
        assert failure is not None
        raise failure

    async def _through(self, hop: Hop, hidden_states: torch.Tensor, batch: StepInput) -> torch.Tensor:
        codec = self._config.codec
        request = Forward(
            self._servers.facts.model_id,
            hop.span,
            encode_tensor(hidden_states, codec),
            None if batch.attention_mask is None else encode_tensor(batch.attention_mask),
            None if batch.position_ids is None else encode_tensor(batch.position_ids),
            codec,
        )
        try:
            reply = await self._rpc.forward(hop.peer_id, request, self._config.timeout_s(batch.num_tokens_in_total))
            answer = decode_finite(reply.hidden_states, hop)
            if answer.shape != hidden_states.shape:
                raise BadAnswer(f"answered {list(answer.shape)} to {list(hidden_states.shape)}", hop.peer_id)
        except (RemoteError, NetworkError, RequestRefused) as error:
            raise at_hop(error, hop) from error
        return answer
