"""`ServerLoad` as a map in an `info_reply`, and back."""

from dataclasses import asdict
from typing import Any

from p2pswarm.core.server_load import ServerLoad
from p2pswarm.wire.fields import Fields


def server_load_values(load: ServerLoad) -> dict[str, Any]:
    """The map: its fields under their own names."""
    return asdict(load)


def read_server_load(fields: Fields) -> ServerLoad:
    """The load that such a map holds; what is missing is 0."""
    return ServerLoad(
        uptime_s=fields.number("uptime_s", 0.0),
        num_sessions=fields.integer("num_sessions", default=0),
        num_waiting=fields.integer("num_waiting", default=0),
        mean_batch_rows=fields.number("mean_batch_rows", 0.0),
        cache_tokens_used=fields.integer("cache_tokens_used", default=0),
        cache_tokens_total=fields.integer("cache_tokens_total", default=0),
        num_evicted=fields.integer("num_evicted", default=0),
        decode_tokens_per_s=fields.number("decode_tokens_per_s", 0.0),
        prefill_tokens_per_s=fields.number("prefill_tokens_per_s", 0.0),
        forward_tokens_per_s=fields.number("forward_tokens_per_s", 0.0),
        sent_bytes=fields.integer("sent_bytes", default=0),
        received_bytes=fields.integer("received_bytes", default=0),
        num_errors=fields.integer("num_errors", default=0),
        num_moves=fields.integer("num_moves", default=0),
    )
