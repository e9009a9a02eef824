"""Servers that compute with `stage_model.py`, take the time that `setting.py` says, and fail by chance.

A hand-over that fails breaks all connections of the server that was to take the hidden states (the last hand-over, to
the client: of the server that has them); all its sessions are lost with their caches. The server is there again at
once, empty: what fails in the paper's experiment is the hand-over, not the machine.
"""

from random import Random

import torch
import trio

from p2pswarm.core.errors import BadRequest, ServerBusy
from p2pswarm.core.ids import ModelId, PeerId
from p2pswarm.core.server_info import ServerInfo, ServerState
from p2pswarm.core.span import Span
from p2pswarm.net.network import Network
from p2pswarm.wire.codecs import decode_tensor, encode_tensor
from p2pswarm.wire.messages import (
    ITEM_BYTES,
    Backward,
    BackwardReply,
    Forward,
    ForwardReply,
    InfoReply,
    OpenSession,
    Step,
    StepReply,
)
from simulations.churn.setting import HIDDEN_SIZE, NUM_BLOCKS, Setting
from simulations.churn.stage_model import StageState

MODEL_ID = ModelId("bloom-7b1-simulated@0123456789abcdef")
MAX_LENGTH = 2048
CACHE_TOKENS = 1 << 20


class StageService:
    """A `rpc.service.RpcService` for one stage."""

    def __init__(self, network: Network, span: Span, setting: Setting, failure_rate: float, randomness: Random) -> None:
        self.num_failures = 0
        self.span = span
        self._network = network
        self._setting = setting
        self._failure_rate = failure_rate
        self._random = randomness

    @property
    def peer_id(self) -> PeerId:
        return self._network.peer_id

    async def info(self, peer_id: PeerId) -> InfoReply:
        return InfoReply(self.announcement())

    async def open_session(self, peer_id: PeerId, request: OpenSession) -> "StageSession":
        self._check(request.span)
        return StageSession(self, request.max_length)

    async def forward(self, peer_id: PeerId, request: Forward) -> ForwardReply:
        self._check(request.span)
        num_tokens = request.hidden_states.shape[1]
        state = StageState(self.span, num_tokens)
        return ForwardReply(encode_tensor(await self.run(state, decode_tensor(request.hidden_states), 0)))

    async def backward(self, peer_id: PeerId, request: Backward) -> BackwardReply:
        raise BadRequest("nobody trains here", peer_id)

    async def run(self, state: StageState, hidden_states: torch.Tensor, position: int) -> torch.Tensor:
        """One call: hidden states are handed over to this server, computed with, and, at the end, handed back."""
        await self._take_a_chance()
        num_tokens = hidden_states.shape[1]
        await trio.sleep(self._setting.call_s(self.span.num_blocks, num_tokens, position + num_tokens))
        if self.span.end == NUM_BLOCKS:
            await self._take_a_chance()
        return state.run(hidden_states, position)

    def announcement(self) -> ServerInfo:
        """What it would tell the swarm."""
        setting = self._setting
        bytes_per_token = HIDDEN_SIZE * ITEM_BYTES["float32"]
        return ServerInfo(
            peer_id=self._network.peer_id,
            model_id=MODEL_ID,
            span=self.span,
            state=ServerState.ONLINE,
            addresses=self._network.addresses,
            num_model_blocks=NUM_BLOCKS,
            throughput_tokens_per_s=1 / (setting.token_s * self.span.num_blocks),
            inference_tokens_per_s=1 / setting.block_s,
            forward_tokens_per_s=1 / setting.token_s,
            network_tokens_per_s=setting.simulated_bandwidth_bytes_per_s / bytes_per_token,
            dtype="float32",
            cache_tokens_left=CACHE_TOKENS,
            max_length=MAX_LENGTH,
        )

    async def _take_a_chance(self) -> None:
        if self._random.random() >= self._failure_rate:
            return
        self.num_failures += 1
        for peer_id in sorted(self._network.connected_peers):
            await self._network.disconnect(peer_id)
        # Ends the call in silence: an answer has no connection to go by, and this one is not worth a line in the log.
        raise ServerBusy("the hand-over failed")

    def _check(self, span: Span) -> None:
        if span != self.span:
            raise BadRequest(f"this server runs blocks {self.span} at once, not {span}")


class StageSession:
    """One client's text in one stage."""

    def __init__(self, service: StageService, max_length: int) -> None:
        self._service = service
        self._state = StageState(service.span, max_length)

    async def step(self, step: Step) -> StepReply:
        if step.position > self._state.length:
            raise BadRequest(f"position {step.position} is beyond the {self._state.length} tokens in the cache")
        answer = await self._service.run(self._state, decode_tensor(step.hidden_states), step.position)
        return StepReply(step.step_id, self._state.length, encode_tensor(answer))

    async def close(self) -> None:
        """Nothing is kept that would have to be given back."""
