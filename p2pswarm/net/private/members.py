"""Who is a member of this node's private swarm right now: the newest list that it was given, told or has kept.

Without any list, whoever has the key is a member. Lists come from the operator's file, which is looked at again and
again, and from other members (`member_exchange.py`). The newest is kept on disk, so that a restart does not bring
back who was removed. No clock, no network.
"""

import logging
from pathlib import Path

import trio

from p2pswarm.core.errors import ConfigError, NotAMember, ProtocolViolation
from p2pswarm.core.ids import PeerId
from p2pswarm.net.private.member_list import MemberList
from p2pswarm.net.whole_files import replace_file

NO_VERSION = 0
"""Of a node that knows no list."""

logger = logging.getLogger(__name__)


class Members:
    """Those of the swarm whose lists `owner` signs. `given` is the operator's file, `kept` our own copy."""

    def __init__(self, owner: PeerId, *, given: Path | None = None, kept: Path | None = None) -> None:
        self.newest: MemberList | None = None
        self._owner = owner
        self._given = given
        self._given_changed_ns: int | None = None
        self._kept = kept
        self._has_changed = trio.Event()
        if kept is not None and kept.exists():  # first, since what is taken up after it is written over it
            self._take_kept(kept)
        if given is not None:
            self._given_changed_ns = _changed_ns(given)
            self._take_given(MemberList.load(given))

    @property
    def version(self) -> int:
        """Of the newest list; 0 without one."""
        return NO_VERSION if self.newest is None else self.newest.version

    def has(self, peer_id: PeerId) -> bool:
        """Whether the peer may be in the swarm, given that it has the key."""
        return self.newest is None or self.newest.has(peer_id)

    def check_own(self, peer_id: PeerId) -> None:
        """Raises `NotAMember` where this node itself is not in the list."""
        if not self.has(peer_id):
            raise NotAMember(
                f"{peer_id}, this node, is not a member of the private swarm any more (version {self.version} of its "
                "list): its owner can add it"
            )

    def take(self, offered: MemberList) -> bool:
        """Takes up a list that is newer than ours; whether it was. Raises `ProtocolViolation`: not by the owner."""
        if offered.owner != self._owner:
            raise ProtocolViolation(f"a member list by {offered.owner}, wanted one by {self._owner}")
        if offered.version <= self.version:
            return False
        self.newest = offered
        self._keep(offered)
        self._has_changed.set()
        self._has_changed = trio.Event()
        return True

    def look_at_file(self) -> None:
        """Takes up what the operator has changed in the file; what is wrong with it is logged."""
        if self._given is None or (changed_ns := _changed_ns(self._given)) == self._given_changed_ns:
            return
        self._given_changed_ns = changed_ns
        try:
            self._take_given(MemberList.load(self._given))
        except ConfigError as error:
            logger.warning("the member list was changed, but cannot be used: %s", error)

    async def wait_newer_than(self, version: int) -> None:
        """Returns at once where there is a newer list already."""
        while self.version <= version:
            await self._has_changed.wait()

    async def raise_when_removed(self, peer_id: PeerId) -> None:
        """Raises `NotAMember` as soon as a newer list than today's comes without the peer, this node."""
        while True:
            await self.wait_newer_than(self.version)
            self.check_own(peer_id)

    def _take_given(self, given: MemberList) -> None:
        try:
            self.take(given)
        except ProtocolViolation as error:
            raise ConfigError(f"{self._given}: {error}: it belongs to another swarm key") from error

    def _take_kept(self, path: Path) -> None:
        try:
            self.take(MemberList.load(path))
        except (ConfigError, ProtocolViolation) as error:
            logger.warning("the kept member list is of no use: %s", error)

    def _keep(self, newest: MemberList) -> None:
        if self._kept is None:
            return
        try:
            replace_file(self._kept, newest.text)
        except OSError as error:
            logger.warning("cannot keep the member list in %s: %s", self._kept, error.strerror)


def _changed_ns(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None
