"""What a server of calls implements, and what `rpc/server.py` promises it in return.

Errors say what the caller is told: `BadRequest` and `CodecError` that its request was wrong, `ServerBusy` that there
is no room now; in a session, all three mean that the step changed nothing, and the session goes on. `SessionLost` ends
a session in good order: its client goes on elsewhere. Anything else is a failure of ours: it is logged, the caller
hears no details, and a session is over.

A request's bytes are counted and bounded by `rpc/limits.py` until it is answered. What a session keeps of the tuning it
was opened with is the service's to bound.
"""

from typing import Protocol

from p2pswarm.core.ids import PeerId
from p2pswarm.wire.messages import (
    Backward,
    BackwardReply,
    Forward,
    ForwardReply,
    InfoReply,
    OpenSession,
    Step,
    StepReply,
)


class SessionService(Protocol):
    """One session; its steps come one at a time."""

    async def step(self, step: Step) -> StepReply:
        """Cancelled when it takes too long, or at the end of a drain; no other step follows then."""
        ...

    async def close(self) -> None:
        """Called exactly once, whatever happened: end, reset, timeout, shutdown. Shielded, for a few seconds."""
        ...


class RpcService(Protocol):
    """Answers calls of strangers. Messages have passed their own checks, nothing else."""

    async def info(self, peer_id: PeerId) -> InfoReply: ...

    async def open_session(self, peer_id: PeerId, request: OpenSession) -> SessionService: ...

    async def forward(self, peer_id: PeerId, request: Forward) -> ForwardReply: ...

    async def backward(self, peer_id: PeerId, request: Backward) -> BackwardReply: ...
