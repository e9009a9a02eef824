"""Which of the records we hold a newly met node should have too.

Owners renew their records often, at whoever is closest by then, so nothing is ever lost for long; handing over closes
the gap until the next renewal, when a swarm starts or many nodes come at once. So that a newcomer does not get
everything k times, only the few holders closest to a key send it.
"""

from collections.abc import Iterable

from p2pswarm.dht.contact import Contact, distance, key_id_of, node_id_of

NUM_SENDERS = 3
"""Holders that send each record: two more than needed, since one may hang and one may just have come itself."""


def keys_to_hand_over(
    keys: Iterable[bytes], own_id: bytes, newcomer: Contact, contacts: Iterable[Contact], k: int
) -> list[bytes]:
    """Those of `keys` that the newcomer is among the k closest nodes to, and we are among the closest of the others."""
    others = [node_id_of(contact.peer_id) for contact in contacts if contact.peer_id != newcomer.peer_id]
    newcomer_id = node_id_of(newcomer.peer_id)
    return [key for key in keys if _is_ours_to_send(key_id_of(key), own_id, newcomer_id, others, k)]


def _is_ours_to_send(key_id: bytes, own_id: bytes, newcomer_id: bytes, others: list[bytes], k: int) -> bool:
    own_distance = distance(own_id, key_id)
    newcomer_distance = distance(newcomer_id, key_id)
    distances = [distance(other, key_id) for other in others]
    num_closer_than_us = sum(each < own_distance for each in distances)
    num_closer_than_newcomer = sum(each < newcomer_distance for each in distances) + (own_distance < newcomer_distance)
    return num_closer_than_us < NUM_SENDERS and num_closer_than_newcomer < k
