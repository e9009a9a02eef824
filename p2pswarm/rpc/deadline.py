"""The caller's deadline for a peer to answer, as an error that names the peer."""

from collections.abc import Iterator
from contextlib import contextmanager

import trio

from p2pswarm.core.errors import DeadlineExceeded
from p2pswarm.core.ids import PeerId


@contextmanager
def deadline(timeout_s: float, peer_id: PeerId, what: str) -> Iterator[None]:
    """Within, `timeout_s` may pass; then `DeadlineExceeded` says that the peer did not do `what` (an infinitive)."""
    try:
        with trio.fail_after(timeout_s):
            yield
    except trio.TooSlowError as error:
        raise DeadlineExceeded(f"{peer_id} did not {what} within {timeout_s:g} s", peer_id) from error
