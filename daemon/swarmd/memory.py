"""How much KV cache is promised to whom, in tokens. Pure counting: `swarmd/handler.py` reserves,
`swarmd/span_session.py` gives back.

A promise is made when a session opens, for all that it may ever hold (batch times longest length), so that no session
fails half-way for want of memory. A session over a part of the span's blocks takes that part.
"""

from dataclasses import dataclass

from p2pswarm.core.errors import ServerBusy

FREE_MEMORY_FOR_CACHE = 0.25
"""Of what is free once the weights are loaded: activations, page cache and the machine's other work need the rest."""
MAX_DEFAULT_CACHE_TOKENS = 1 << 17
"""128 Ki: 16 sessions of 8 Ki tokens. Small models would otherwise announce more than any one device can decode."""
MIN_DEFAULT_CACHE_TOKENS = 2048
"""One chat: less is no use to anybody, so the operator is better served by a server that tries."""


@dataclass(frozen=True, slots=True, eq=False)
class Reservation:
    """A promise of room; worth nothing once released."""

    token_blocks: int


class CacheBudget:
    """Room for `total_tokens` tokens over all `num_blocks` blocks; never promises more."""

    def __init__(self, total_tokens: int, num_blocks: int) -> None:
        self.total_tokens = total_tokens
        self.num_blocks = num_blocks
        self._left = total_tokens * num_blocks
        self._held: set[Reservation] = set()

    @property
    def tokens_left(self) -> int:
        """Tokens, over all blocks, not yet promised."""
        return self._left // self.num_blocks

    @property
    def num_reservations(self) -> int:
        return len(self._held)

    def reserve(self, tokens: int, num_blocks: int) -> Reservation:
        """Promises room for `tokens` tokens over `num_blocks` blocks. Raises `ServerBusy` where there is none."""
        reservation = Reservation(tokens * num_blocks)
        if reservation.token_blocks > self._left:
            raise ServerBusy(
                f"no room for {tokens} tokens of KV cache over {num_blocks} blocks: "
                f"{self._left // num_blocks} of {self.total_tokens * self.num_blocks // num_blocks} are left"
            )
        self._left -= reservation.token_blocks
        self._held.add(reservation)
        return reservation

    def release(self, reservation: Reservation) -> None:
        """Takes the promise back; a second time does nothing."""
        if reservation in self._held:
            self._held.remove(reservation)
            self._left += reservation.token_blocks


def default_cache_tokens(free_bytes: int, bytes_per_token: int) -> int:
    """How many tokens of KV cache to offer on a machine with so much free memory."""
    fitting = int(free_bytes * FREE_MEMORY_FOR_CACHE) // max(bytes_per_token, 1)
    return max(MIN_DEFAULT_CACHE_TOKENS, min(fitting, MAX_DEFAULT_CACHE_TOKENS))
