"""The servers of one model as far as records tell: newest word of each, expiry, withdrawal, and what we found out
ourselves.

Sans-IO: records and times in, servers out. `directory/view.py` keeps it up to date.
"""

import logging
import math
from collections.abc import Iterable, Mapping

from p2pswarm.core.errors import MalformedMessage
from p2pswarm.core.ids import ModelId, PeerId
from p2pswarm.core.server_info import ServerInfo, ServerState
from p2pswarm.dht.record import SignedRecord, is_newer
from p2pswarm.directory.announcement import read_announcement

logger = logging.getLogger(__name__)


class ServerList:
    """Takes checked records (`DhtNode.get`); remembers withdrawals too, until they expire, so that no older word
    comes back."""

    def __init__(self, model_id: ModelId) -> None:
        self._model_id = model_id
        self._records: dict[PeerId, SignedRecord] = {}
        self._infos: dict[PeerId, ServerInfo] = {}
        self._gone: set[PeerId] = set()

    def records(self) -> list[SignedRecord]:
        """All that is held, for the next `DhtNode.get` to build on."""
        return list(self._records.values())

    def take(self, records: Iterable[SignedRecord]) -> None:
        """Takes up what is newer than what is held; what makes no sense is left out."""
        for record in records:
            if not is_newer(record, self._records.get(record.owner)):
                continue
            self._records[record.owner] = record
            self._infos.pop(record.owner, None)
            self._gone.discard(record.owner)
            try:
                self._infos[record.owner] = read_announcement(record, self._model_id)
            except MalformedMessage as error:
                logger.debug("%s", error)

    def mark_offline(self, peer_id: PeerId) -> None:
        """Leaves the server out until it announces itself anew."""
        if peer_id in self._records:
            self._gone.add(peer_id)

    def expire(self, now_unix_s: float) -> None:
        """Drops what has expired."""
        for owner in [owner for owner, record in self._records.items() if record.expires_unix_s <= now_unix_s]:
            del self._records[owner]
            self._infos.pop(owner, None)
            self._gone.discard(owner)

    @property
    def next_expiry_unix_s(self) -> float:
        return min((record.expires_unix_s for record in self._records.values()), default=math.inf)

    def servers(self) -> Mapping[PeerId, ServerInfo]:
        """Those that are in the swarm by their own newest word, in whatever state but offline."""
        return {
            peer_id: info
            for peer_id, info in self._infos.items()
            if info.state is not ServerState.OFFLINE and peer_id not in self._gone
        }
