"""A step that a server takes through its own service, as a client's session would: the proof that it computes.

Asks no network. Imports torch.
"""

import math

import torch

from p2pswarm.core.errors import BadAnswer, ServerBusy, SessionLost
from p2pswarm.core.ids import SessionId
from p2pswarm.core.server_info import ServerInfo
from p2pswarm.rpc.service import RpcService
from p2pswarm.wire.codecs import decode_tensor, encode_tensor
from p2pswarm.wire.messages import OpenSession, Step

PROBE_SESSION = SessionId("probe")


async def probe(service: RpcService, info: ServerInfo, hidden_size: int) -> None:
    """Runs one token through all blocks of `info`. Raises `BadAnswer`, or what the service raises.

    A service that has no room for it has clients, and answers them: that is fine too.
    """
    sent = torch.ones(1, 1, hidden_size)
    request = OpenSession(PROBE_SESSION, info.model_id, info.span, max_length=1, batch_size=1)
    try:
        session = await service.open_session(info.peer_id, request)
        try:
            reply = await session.step(Step(0, 0, encode_tensor(sent)))
        finally:
            await session.close()
    except (ServerBusy, SessionLost):
        return
    answer = decode_tensor(reply.hidden_states)
    if answer.shape != sent.shape or not math.isfinite(answer.sum().item()):
        raise BadAnswer(f"blocks {info.span} made {list(answer.shape)} of one token, or no numbers", info.peer_id)
