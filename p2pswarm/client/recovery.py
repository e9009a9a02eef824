"""How long to go on trying after failures: pure, with the time handed in.

A failure of one server is answered at once by another one; it counts, so that `max_retries` bounds it. A server behind
a relay may have lost its relay only, and is tried once more by whatever other way there is to it. Blocks that nobody
can serve at the moment are waited for, longer each time. All of it ends at the deadline, which starts with the
first failure.
"""

from p2pswarm.client.config import ClientConfig
from p2pswarm.core.errors import (
    BadRequest,
    MissingBlocksError,
    NetworkError,
    RemoteError,
    RequestRefused,
    ServerBusy,
    SessionLost,
)
from p2pswarm.core.ids import PeerId
from p2pswarm.core.span import Span
from p2pswarm.routing.bans import BanReason
from p2pswarm.routing.route import short_peers

FIRST_WAIT_S, LONGEST_WAIT_S = 0.25, 4.0
LAST_RESORT_WAITS = 4
"""After so many, some 4 s: other servers had their time to come back."""
FIRST_OPEN_TIMEOUT_S, MORE_OPEN_TIMEOUT_S = 4.0, 1.0
"""A dial and three round trips at 400 ms each take it all; a server that hangs takes it too."""

HopFailure = RemoteError | NetworkError | RequestRefused


def ban_reason(error: HopFailure) -> BanReason | None:
    """Why the server is banned after this failure; None where it is not to blame."""
    match error:
        case RequestRefused() | ServerBusy() | SessionLost() | BadRequest():
            return None
        case NetworkError():
            return BanReason.UNREACHABLE
        case _:
            return BanReason.MISBEHAVED


class Recovery:
    """The failures of one step, or of one call, so far."""

    def __init__(self, config: ClientConfig) -> None:
        self.avoided: set[PeerId] = set()
        """Servers that had no room or refused: not asked again until blocks had to be waited for."""
        self.last_failure: HopFailure | None = None
        self.num_failures = 0
        self._config = config
        self._deadline_s: float | None = None
        self.num_waits = 0
        self._failed: set[PeerId] = set()
        self._had_another_chance: set[PeerId] = set()
        self._had_another_path: set[PeerId] = set()

    @property
    def open_timeout_s(self) -> float:
        """For one server to open a session: short while others can be asked, longer each time that none is left."""
        return min(self._config.open_timeout_s, FIRST_OPEN_TIMEOUT_S + MORE_OPEN_TIMEOUT_S * self.num_waits)

    def after_failure(self, error: HopFailure, blocks: Span, now_s: float) -> None:
        """Notes that the server of `blocks` failed. Raises `error` when it was one too many for `max_retries`,
        `MissingBlocksError` when the time is up."""
        self._start(now_s)
        if isinstance(error, RequestRefused) and isinstance(self.last_failure, RequestRefused):
            raise error  # two servers say that the request is wrong
        self.last_failure = error
        self.num_failures += 1
        if error.peer_id is not None:
            self._failed.add(error.peer_id)
            if ban_reason(error) is None:
                self.avoided.add(error.peer_id)
        if self._config.max_retries is not None and self.num_failures > self._config.max_retries:
            raise error
        if self._is_time_up(now_s):
            missing = MissingBlocksError(f"no server for blocks {blocks} that works", [(blocks.start, blocks.end)])
            raise self.explained(missing) from error

    def wait_s(self, error: MissingBlocksError, now_s: float) -> float:
        """How long to wait for missing blocks: not at all at first, since servers that failed may be back already.

        Raises `error`, with what was tried, when it has been too long.
        """
        self._start(now_s)
        if self._is_time_up(now_s):
            raise self.explained(error) from self.last_failure
        self.avoided.clear()
        if isinstance(self.last_failure, RequestRefused):
            raise self.last_failure
        wait_s = min(FIRST_WAIT_S * 2.0 ** (self.num_waits - 1), LONGEST_WAIT_S) if self.num_waits else 0.0
        self.num_waits += 1
        assert self._deadline_s is not None
        return min(wait_s, self._deadline_s - now_s)

    def do_not_count(self, elapsed_s: float) -> None:
        """Puts the deadline off by time that was spent well, on a replay that worked."""
        if self._deadline_s is not None:
            self._deadline_s += elapsed_s

    def gives_another_chance(self, peer_id: PeerId) -> bool:
        """Whether to take back a server that misbehaved: once, as a last resort. It may be well by now, and what it
        answers is checked anyway."""
        if self.num_waits < LAST_RESORT_WAITS or peer_id in self._had_another_chance:
            return False
        self._had_another_chance.add(peer_id)
        return True

    def gives_another_path(self, peer_id: PeerId) -> bool:
        """Whether to try a server once more that was lost while relays led to it."""
        if peer_id in self._had_another_path:
            return False
        self._had_another_path.add(peer_id)
        return True

    def _start(self, now_s: float) -> None:
        if self._deadline_s is None:
            self._deadline_s = now_s + self._config.recovery_timeout_s

    def _is_time_up(self, now_s: float) -> bool:
        return self._deadline_s is not None and now_s >= self._deadline_s

    def explained(self, error: MissingBlocksError) -> MissingBlocksError:
        """The error with the failures that led to it."""
        if self.last_failure is None:
            return error
        tried = short_peers(sorted(self._failed))
        return MissingBlocksError(f"{error}; tried: {tried}; the last failure: {self.last_failure}", error.missing)
