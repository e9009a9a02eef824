"""How many bytes have come and wait to be read, in all connections of a node together."""

from dataclasses import dataclass


@dataclass(slots=True)
class UnreadBytes:
    """Counted by the connections that share it."""

    max_bytes: int
    num_bytes: int = 0

    @property
    def is_too_much(self) -> bool:
        return self.num_bytes > self.max_bytes
