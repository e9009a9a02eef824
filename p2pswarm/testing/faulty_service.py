"""`FaultyService`: any `RpcService`, made to fail in whatever way a test wants to see survived. No torch.

Bytes that are no messages at all, lost connections and hung machines are the network's faults, not a service's: see
`testing/memory_network.py`.
"""

from dataclasses import replace
from enum import Enum

import trio

from p2pswarm.core.errors import BadRequest, ServerBusy
from p2pswarm.core.ids import PeerId
from p2pswarm.rpc.service import RpcService, SessionService
from p2pswarm.wire.frames import num_bytes
from p2pswarm.wire.messages import (
    Backward,
    BackwardReply,
    Forward,
    ForwardReply,
    InfoReply,
    OpenSession,
    Step,
    StepReply,
    WireTensor,
    encoded_num_bytes,
)


class Fault(Enum):
    """What is wrong with a server while its connections are well."""

    HANGS = "does not answer until it is mended"
    FAILS = "reports a failure of its own"
    IS_BUSY = "says that it has no room"
    REFUSES = "says that the request is wrong"
    NOT_FINITE = "answers NaN"
    WRONG_SHAPE = "answers one token too many"
    WRONG_POSITION = "answers as if its cache held another number of tokens"
    OTHER_STEP = "answers a step that was not asked"


class FaultyService:
    """Answers as `service` does while `fault` is None. A fault shows in every call and step from then on."""

    def __init__(self, service: RpcService) -> None:
        self.service = service
        self.num_faults_shown = 0
        self._fault: Fault | None = None
        self._mended = trio.Event()

    @property
    def fault(self) -> Fault | None:
        return self._fault

    @fault.setter
    def fault(self, fault: Fault | None) -> None:
        self._fault = fault
        self._mended.set()
        self._mended = trio.Event()

    async def info(self, peer_id: PeerId) -> InfoReply:
        await self.show_before()
        return await self.service.info(peer_id)

    async def open_session(self, peer_id: PeerId, request: OpenSession) -> "FaultySession":
        await self.show_before()
        return FaultySession(self, await self.service.open_session(peer_id, request))

    async def forward(self, peer_id: PeerId, request: Forward) -> ForwardReply:
        await self.show_before()
        reply = await self.service.forward(peer_id, request)
        return replace(reply, hidden_states=self.spoiled(reply.hidden_states))

    async def backward(self, peer_id: PeerId, request: Backward) -> BackwardReply:
        await self.show_before()
        reply = await self.service.backward(peer_id, request)
        return replace(reply, grad_inputs=self.spoiled(reply.grad_inputs))

    async def show_before(self) -> None:
        """The faults of a server that does not get as far as an answer."""
        if self._shows(Fault.FAILS):
            raise RuntimeError("this server was made to fail")
        if self._shows(Fault.IS_BUSY):
            raise ServerBusy("this server was made to have no room")
        if self._shows(Fault.REFUSES):
            raise BadRequest("this server was made to refuse everything")
        if self._shows(Fault.HANGS):
            while self._fault is Fault.HANGS:
                await self._mended.wait()

    def spoiled(self, hidden_states: WireTensor) -> WireTensor:
        """Hidden states as this server answers them."""
        if self._shows(Fault.NOT_FINITE):
            # All bits set are NaN in every float dtype, and in the scales of the int8 codec.
            return replace(hidden_states, data=b"\xff" * num_bytes(hidden_states.data))
        if self._shows(Fault.WRONG_SHAPE):
            batch_size, num_tokens, hidden_size = hidden_states.shape
            shape = (batch_size, num_tokens + 1, hidden_size)
            data = bytes(encoded_num_bytes(hidden_states.dtype, shape, hidden_states.codec))
            return replace(hidden_states, shape=shape, data=data)
        return hidden_states

    def spoiled_reply(self, reply: StepReply) -> StepReply:
        """A step's answer as this server gives it."""
        if self._shows(Fault.WRONG_POSITION):
            return replace(reply, position=reply.position + 1)
        if self._shows(Fault.OTHER_STEP):
            return replace(reply, step_id=reply.step_id + 1)
        return replace(reply, hidden_states=self.spoiled(reply.hidden_states))

    def _shows(self, fault: Fault) -> bool:
        self.num_faults_shown += self._fault is fault
        return self._fault is fault


class FaultySession:
    """A session at such a server."""

    def __init__(self, service: FaultyService, session: SessionService) -> None:
        self._service = service
        self._session = session

    async def step(self, step: Step) -> StepReply:
        await self._service.show_before()
        return self._service.spoiled_reply(await self._session.step(step))

    async def close(self) -> None:
        await self._session.close()
