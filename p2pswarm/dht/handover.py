"""Which of the records we hold a newly met node should have too.

Owners renew their records often, at whoever is closest by then, so nothing is ever lost for long; handing over closes
the gap until the next renewal, when a swarm starts or many nodes come at once. So that a newcomer does not get
everything k times, only the few holders closest to a key send it; but whoever came lately may hold nothing yet, and is
not relied upon.
"""

from collections.abc import Callable, Collection, Iterable

from p2pswarm.dht.contact import Contact, key_id_of, node_id_of

NUM_SENDERS = 3
"""Holders that send each record: two more than needed, since one may hang and one may have missed it."""


def keys_to_hand_over(
    keys: Iterable[bytes],
    own_id: bytes,
    newcomer: Contact,
    others: Collection[Contact],
    settled: Collection[Contact],
    k: int,
) -> list[bytes]:
    """Those of `keys` that are the newcomer's to hold and ours to send.

    The newcomer must be among the k closest of us and the `others`, and we among the closest of the `settled` ones.
    """
    others_and_us = [
        own_id,
        *(node_id_of(contact.peer_id) for contact in others if contact.peer_id != newcomer.peer_id),
    ]
    is_the_newcomers = _ranking(node_id_of(newcomer.peer_id), others_and_us, k)
    is_ours = _ranking(own_id, [node_id_of(contact.peer_id) for contact in settled], NUM_SENDERS)
    return [key for key in keys if is_the_newcomers(key) and is_ours(key)]


def _ranking(node_id: bytes, others: Iterable[bytes], count: int) -> Callable[[bytes], bool]:
    """Tells of a key whether the node is among the `count` closest to it."""
    own_number = int.from_bytes(node_id, "big")
    numbers = [int.from_bytes(other, "big") for other in others]

    def is_among_closest(key: bytes) -> bool:
        target = int.from_bytes(key_id_of(key), "big")
        own_distance = own_number ^ target
        return sum(number ^ target < own_distance for number in numbers) < count

    return is_among_closest
