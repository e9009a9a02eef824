"""What models the swarm serves and who serves them: the reading side of the directory.

Servers write it with `directory/announcer.py`; `directory/announcement.py` says what lies where in the DHT.
"""

import logging
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from random import Random, SystemRandom

from p2pswarm.core.clock import Clock
from p2pswarm.core.errors import MalformedMessage
from p2pswarm.core.ids import ModelId, PeerId
from p2pswarm.core.nursery import open_transparent_nursery
from p2pswarm.core.server_info import ServerInfo
from p2pswarm.dht.node import DhtNode
from p2pswarm.dht.record import SignedRecord
from p2pswarm.directory.announcement import MODELS_KEY, Listing, model_key, read_listing
from p2pswarm.directory.server_list import ServerList
from p2pswarm.directory.view import ModelView

DEFAULT_PERIOD_S = 10.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ModelSummary:
    """A model that is announced."""

    model_id: ModelId
    num_blocks: int
    """As most of its servers say."""
    num_servers: int


class Directory:
    """Reads what servers announce."""

    def __init__(self, dht: DhtNode, clock: Clock, random: Random | None = None) -> None:
        self._dht = dht
        self._clock = clock
        self._random = random or SystemRandom()

    async def models(self) -> Mapping[ModelId, ModelSummary]:
        """All models that some server announces. Of more than 2048 servers in all, some are not counted."""
        records = await self._dht.get(MODELS_KEY)
        return summarize(records.values())

    async def servers(self, model_id: ModelId) -> Mapping[PeerId, ServerInfo]:
        """The servers of the model, in whatever state but offline."""
        servers = ServerList(model_id)
        servers.take((await self._dht.get(model_key(model_id))).values())
        return servers.servers()

    def view(self, model_id: ModelId, period_s: float = DEFAULT_PERIOD_S) -> ModelView:
        """A view of the model's servers that is as new as its last `refresh`, to which only news travels."""
        return ModelView(model_id, self._dht, self._clock, self._random, period_s)

    @asynccontextmanager
    async def watch(self, model_id: ModelId, period_s: float = DEFAULT_PERIOD_S) -> AsyncIterator[ModelView]:
        """A view of the model's servers that has had its first look, and stays true until the context is left."""
        view = self.view(model_id, period_s)
        async with open_transparent_nursery() as nursery:
            await nursery.start(view.run)
            yield view
            nursery.cancel_scope.cancel()


def summarize(records: Iterable[SignedRecord]) -> Mapping[ModelId, ModelSummary]:
    """The models that the listings speak of; what makes no sense, or has been withdrawn, is left out."""
    by_model: defaultdict[ModelId, list[Listing]] = defaultdict(list)
    for record in records:
        try:
            listing = read_listing(record)
        except MalformedMessage as error:
            logger.debug("%s", error)
            continue
        if listing.is_listed:
            by_model[listing.model_id].append(listing)
    return {
        model_id: ModelSummary(model_id, _most_named(listings), len(listings))
        for model_id, listings in by_model.items()
    }


def _most_named(listings: Iterable[Listing]) -> int:
    return Counter(listing.num_model_blocks for listing in listings).most_common(1)[0][0]
