"""`ServerInfo` as bytes: what announcements hold and `InfoReply` carries; every field of a stranger is checked.

Knows nothing of signatures and expiry: that is the record around it (`dht/record.py`).
"""

from collections.abc import Mapping
from typing import Any

import msgpack

from p2pswarm.core.errors import ConfigError, MalformedMessage
from p2pswarm.core.ids import ModelId, PeerId
from p2pswarm.core.reachability import Reachability
from p2pswarm.core.server_info import ServerInfo, ServerState
from p2pswarm.wire.fields import Fields
from p2pswarm.wire.frames import Buffer, unpack_strictly

MAX_ADDRESSES = 32
"""A machine with several interfaces, each on IPv4 and IPv6."""
MAX_ADDRESS_CHARACTERS = 256
MAX_ADAPTERS = 64
MAX_NEXT_RTTS = 64
MAX_NAME_CHARACTERS = 128
MAX_BLOCKS = 1 << 16


def encode_server_info(info: ServerInfo) -> bytes:
    """The announcement as msgpack. Raises `ConfigError` where no reader would take it."""
    packed: bytes = msgpack.packb(server_info_values(info))
    try:
        decode_server_info(packed, info.peer_id)
    except MalformedMessage as error:
        raise ConfigError(f"not an announcement that others will take: {error}") from error
    return packed


def decode_server_info(data: Buffer, from_whom: PeerId | None = None) -> ServerInfo:
    """The announcement in `data`. Raises `MalformedMessage` (a `ProtocolViolation`) that names the field."""
    try:
        values = unpack_strictly(data)
    except ValueError as error:
        raise MalformedMessage(
            f"a server info from {from_whom or 'a peer'} is not msgpack: {error}", from_whom
        ) from error
    return read_server_info(Fields(values, "server info", from_whom))


def server_info_values(info: ServerInfo) -> dict[str, Any]:
    """The announcement as a plain map, for msgpack."""
    return {
        "peer_id": info.peer_id,
        "model_id": info.model_id,
        "span": [info.span.start, info.span.end],
        "state": info.state.value,
        "addresses": list(info.addresses),
        "num_model_blocks": info.num_model_blocks,
        "throughput_tokens_per_s": info.throughput_tokens_per_s,
        "inference_tokens_per_s": info.inference_tokens_per_s,
        "forward_tokens_per_s": info.forward_tokens_per_s,
        "network_tokens_per_s": info.network_tokens_per_s,
        "dtype": info.dtype,
        "quantization": info.quantization,
        "cache_tokens_left": info.cache_tokens_left,
        "max_length": info.max_length,
        "adapters": list(info.adapters),
        "using_relay": info.using_relay,
        "next_rtts_s": dict(info.next_rtts_s),
        "queue_delay_s": info.queue_delay_s,
        "public_name": info.public_name,
        "version": info.version,
        "next_span": None if info.next_span is None else [info.next_span.start, info.next_span.end],
        "is_pinned": info.is_pinned,
        "reachability": info.reachability.value,
    }


def read_server_info(fields: Fields) -> ServerInfo:
    """The announcement that such a map holds."""
    span = fields.span("span")
    next_span = fields.span("next_span") if fields.has("next_span") else None
    num_model_blocks = fields.integer("num_model_blocks", 1, MAX_BLOCKS)
    for announced in (span, next_span):
        if announced is not None and announced.end > num_model_blocks:
            fields.refuse(f"a span within the model's {num_model_blocks} blocks, got {announced}")
    return ServerInfo(
        peer_id=PeerId(fields.identifier("peer_id")),
        model_id=ModelId(fields.identifier("model_id")),
        span=span,
        state=_read_state(fields),
        addresses=fields.texts("addresses", MAX_ADDRESSES, MAX_ADDRESS_CHARACTERS),
        num_model_blocks=num_model_blocks,
        throughput_tokens_per_s=fields.number("throughput_tokens_per_s"),
        inference_tokens_per_s=fields.number("inference_tokens_per_s"),
        forward_tokens_per_s=fields.number("forward_tokens_per_s"),
        network_tokens_per_s=fields.number("network_tokens_per_s"),
        dtype=fields.identifier("dtype"),
        quantization=_read_printable(fields, "quantization", "none"),
        cache_tokens_left=fields.integer("cache_tokens_left", default=0),
        max_length=fields.integer("max_length", default=0),
        adapters=fields.texts("adapters", MAX_ADAPTERS, MAX_NAME_CHARACTERS),
        using_relay=fields.boolean("using_relay", default=False),
        next_rtts_s=_read_next_rtts(fields),
        queue_delay_s=fields.number("queue_delay_s", 0.0),
        public_name=_read_printable(fields, "public_name"),
        version=_read_printable(fields, "version"),
        next_span=next_span,
        is_pinned=fields.boolean("is_pinned", default=False),
        reachability=_read_reachability(fields),
    )


def _read_state(fields: Fields) -> ServerState:
    name = fields.text("state")
    try:
        return ServerState(name)
    except ValueError:
        fields.refuse(f"state to be one of {', '.join(state.value for state in ServerState)}, got {name[:32]!r}")


def _read_reachability(fields: Fields) -> Reachability:
    name = fields.text("reachability", default=Reachability.UNKNOWN.value)
    try:
        return Reachability(name)
    except ValueError:
        wanted = ", ".join(reachability.value for reachability in Reachability)
        fields.refuse(f"reachability to be one of {wanted}, got {name[:32]!r}")


def _read_next_rtts(fields: Fields) -> Mapping[PeerId, float]:
    rtts_s = Fields(dict(fields.mapping("next_rtts_s", MAX_NEXT_RTTS)), "next_rtts_s", fields.peer_id)
    return {PeerId(peer_id): rtts_s.number(peer_id) for peer_id in fields.mapping("next_rtts_s", MAX_NEXT_RTTS)}


def _read_printable(fields: Fields, name: str, default: str = "") -> str:
    """Text that goes to people's terminals: no control characters."""
    text = fields.text(name, MAX_NAME_CHARACTERS, default)
    if not text.isprintable():
        fields.refuse(f"{name} to be printable text, got {text!r}")
    return text
