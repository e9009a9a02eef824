"""What the directory keeps in the DHT: under which keys, and what the values mean.

Two kinds of record, each signed by the server it speaks of:

- under `model_key(model_id)`, one per server of the model: its whole `ServerInfo` (`wire/server_info.py`);
- under `MODELS_KEY`, one per server of any model: a `Listing`, a msgpack map with `model_id`, `num_model_blocks` and
  `is_listed`, by which newcomers learn what models there are.

Pure: knows nothing of nodes.
"""

import hashlib
from dataclasses import dataclass
from typing import Any

import msgpack

from p2pswarm.core.errors import MalformedMessage
from p2pswarm.core.ids import ModelId
from p2pswarm.core.server_info import ServerInfo
from p2pswarm.dht.record import SignedRecord
from p2pswarm.wire.fields import Fields
from p2pswarm.wire.frames import unpack_strictly
from p2pswarm.wire.server_info import MAX_BLOCKS, decode_server_info

MODELS_KEY = hashlib.sha256(b"p2pswarm/models").digest()


def model_key(model_id: ModelId) -> bytes:
    """Where the servers of the model announce themselves."""
    return hashlib.sha256(b"p2pswarm/model/" + model_id.encode()).digest()


@dataclass(frozen=True, slots=True)
class Listing:
    """One server's word that a model is served."""

    model_id: ModelId
    num_model_blocks: int
    is_listed: bool = True
    """False once the server has withdrawn."""


def encode_listing(listing: Listing) -> bytes:
    values: dict[str, Any] = {
        "model_id": listing.model_id,
        "num_model_blocks": listing.num_model_blocks,
        "is_listed": listing.is_listed,
    }
    packed: bytes = msgpack.packb(values)
    return packed


def read_listing(record: SignedRecord) -> Listing:
    """What the record lists. Raises `MalformedMessage`."""
    try:
        values = unpack_strictly(record.value)
    except ValueError as error:
        raise MalformedMessage(f"a listing from {record.owner} is not msgpack: {error}", record.owner) from error
    fields = Fields(values, "a listing", record.owner)
    return Listing(
        model_id=ModelId(fields.identifier("model_id")),
        num_model_blocks=fields.integer("num_model_blocks", 1, MAX_BLOCKS),
        is_listed=fields.boolean("is_listed", default=True),
    )


def read_announcement(record: SignedRecord, model_id: ModelId) -> ServerInfo:
    """What the owner of the record says of itself. Raises `MalformedMessage` where it speaks of another server or
    model."""
    info = decode_server_info(record.value, record.owner)
    if info.peer_id != record.owner or info.model_id != model_id:
        got = f"{info.peer_id} and {info.model_id}"
        raise MalformedMessage(f"{record.owner} announced {got} as a server of {model_id}", record.owner)
    return info
