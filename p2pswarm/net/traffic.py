"""How many bytes a node has sent and received over its connections, all of them together."""

from dataclasses import dataclass


@dataclass(slots=True)
class Traffic:
    """Counts what goes over the sockets of our own sessions, encryption included, handshakes not."""

    sent_bytes: int = 0
    received_bytes: int = 0
