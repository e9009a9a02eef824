"""What a server says of itself: to the swarm, to clients who ask, and to its operator when it is ready. Pure."""

import shlex
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from typing import TYPE_CHECKING

from p2pswarm.core.server_info import ServerInfo, ServerState
from p2pswarm.core.span import Span
from p2pswarm.dht.node import DhtNode
from p2pswarm.net.network import Network
from p2pswarm.wire.messages import InfoReply
from swarmd.config import ServerConfig
from swarmd.figures import Figures
from swarmd.line_speed import Line
from swarmd.presence import Presence

if TYPE_CHECKING:
    from swarmd.engine import LoadedSpan, OpenedModel

MAX_PEERS_TOLD = 20
"""In the answer to a client who asks: enough to find the swarm again when its own first peer is gone."""


def joining_info(config: ServerConfig, network: Network, opened: "OpenedModel", span: Span) -> ServerInfo:
    """Before anything is loaded or measured."""
    return ServerInfo(
        peer_id=network.peer_id,
        model_id=opened.model_id,
        span=span,
        state=ServerState.JOINING,
        addresses=network.addresses,
        num_model_blocks=opened.num_blocks,
        throughput_tokens_per_s=0.0,
        inference_tokens_per_s=0.0,
        forward_tokens_per_s=0.0,
        network_tokens_per_s=0.0,
        dtype=opened.dtype_name,
        quantization=opened.quantization.value,
        adapters=tuple(adapter.adapter_id for adapter in opened.adapters),
        public_name=config.name,
        version=version("p2pswarm"),
    )


def online_info(info: ServerInfo, loaded: "LoadedSpan", line_bits_per_s: float) -> ServerInfo:
    """From when requests are answered."""
    return replace(
        loaded.speed.announced(info, line_bits_per_s),
        state=ServerState.ONLINE,
        cache_tokens_left=loaded.cache_tokens,
        max_length=loaded.max_length,
    )


def answer_info(presence: Presence, figures: Figures | None, dht: DhtNode) -> InfoReply:
    """What a client is told who asks: the announcement with today's figures, if there are any yet, and other nodes."""
    others = {contact.peer_id: contact.addresses for contact in dht.known_contacts()[:MAX_PEERS_TOLD]}
    return InfoReply(presence.info if figures is None else figures.updated(presence.info), peers=others)


def address_to_join_by(config: ServerConfig, info: ServerInfo) -> str:
    """Our own; where we cannot be dialled, and so serve nobody who joins, one that we joined by ourselves."""
    addresses = config.peer_addresses if info.using_relay else info.addresses
    return addresses[0] if addresses else "MULTIADDR"


def ready_fields(
    config: ServerConfig, info: ServerInfo, line: Line, device: str, start_s: float
) -> Mapping[str, object]:
    """Of the event that tells the operator how the server can be reached."""
    key = f" --swarm-key {shlex.quote(str(config.swarm_key))}" if config.swarm_key is not None else ""
    join = f"swarmd start {shlex.quote(config.model)}{key} --peers {address_to_join_by(config, info)}"
    return {
        "peer_id": info.peer_id,
        "addresses": list(info.addresses),
        "model": config.model,
        "model_id": info.model_id,
        "blocks": str(info.span),
        "start_block": info.span.start,
        "end_block": info.span.end,
        "num_model_blocks": info.num_model_blocks,
        "dtype": info.dtype,
        "quantization": info.quantization,
        "adapters": list(info.adapters),
        "device": device,
        "cache_tokens": info.cache_tokens_left,
        "max_length": info.max_length,
        "throughput_tokens_per_s": round(info.throughput_tokens_per_s, 3),
        "line_bits_per_s": round(line.bits_per_s),
        "is_line_known": line.is_known,
        "start_s": round(start_s, 3),
        "join_command": join,
    }
