"""The peers that once answered, kept in a file: how a node finds its swarm again after a restart or an outage.

The file is JSON, `{"version": 1, "peers": ["/ip4/.../p2p/...", ...]}`, one address a line, the latest last; it holds
nothing secret.
"""

import contextlib
import json
import logging
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path

from p2pswarm.core.errors import ConfigError
from p2pswarm.core.ids import PeerId
from p2pswarm.dht.contact import MAX_CONTACT_ADDRESSES, Contact, usable_addresses
from p2pswarm.net.addresses import split_peer_address
from p2pswarm.net.whole_files import replace_file

MAX_KNOWN_PEERS = 64
MAX_FILE_BYTES = 1 << 20
FILE_VERSION = 1

logger = logging.getLogger(__name__)


class KnownPeers:
    """Contacts that answered, the latest last; on disk where a path is given."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._contacts: OrderedDict[PeerId, Contact] = OrderedDict()
        self._saved: frozenset[Contact] = frozenset()
        if path is not None:
            for contact in _load(path):
                self.answered(contact)
            self._saved = frozenset(self._contacts.values())

    def answered(self, contact: Contact) -> None:
        """Notes that the contact is alive and serves."""
        self._contacts[contact.peer_id] = contact
        self._contacts.move_to_end(contact.peer_id)
        if len(self._contacts) > MAX_KNOWN_PEERS:
            self._contacts.popitem(last=False)

    def asked_us(self, contact: Contact) -> None:
        """Notes a contact that says it serves; it never takes the place of one that answered."""
        if contact.peer_id not in self._contacts and len(self._contacts) < MAX_KNOWN_PEERS:
            self._contacts[contact.peer_id] = contact
            self._contacts.move_to_end(contact.peer_id, last=False)

    def contacts(self) -> list[Contact]:
        """The latest first."""
        return list(reversed(self._contacts.values()))

    def save(self) -> None:
        """Writes the file, whole or not at all, if anything in it has changed; a failure is logged, not raised."""
        contacts = frozenset(self._contacts.values())
        if self._path is None or contacts == self._saved:
            return
        addresses = [address for contact in self._contacts.values() for address in contact.addresses]
        try:
            text = json.dumps({"version": FILE_VERSION, "peers": addresses}, indent=1) + "\n"
            replace_file(self._path, text.encode())
        except OSError as error:
            logger.warning("cannot save the known peers to %s: %s", self._path, error.strerror)
            return
        self._saved = contacts


def contacts_at(addresses: Iterable[str]) -> list[Contact]:
    """The peers that live at these addresses; what is not a peer address is left out."""
    by_peer: dict[PeerId, list[str]] = {}
    for address in addresses:
        with contextlib.suppress(ConfigError):
            by_peer.setdefault(split_peer_address(address)[1], []).append(address)
    contacts = (Contact(peer_id, usable_addresses(peer_id, tuple(own))) for peer_id, own in by_peer.items())
    return [contact for contact in contacts if contact.addresses]


def _load(path: Path) -> list[Contact]:
    try:
        with path.open("rb") as file:
            content = json.loads(file.read(MAX_FILE_BYTES))
        addresses = content["peers"]
        is_list_of_text = isinstance(addresses, list) and all(isinstance(address, str) for address in addresses)
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("the file of known peers %s is of no use: %s", path, error)
        return []
    return contacts_at(addresses[-MAX_KNOWN_PEERS * MAX_CONTACT_ADDRESSES :]) if is_list_of_text else []
