"""The error tree. What a caller does next is read off the class, never off the text.

SwarmingError
├── LocalError                we misused it: mend the call or the configuration; never retried, never a peer's fault
│   ├── ConfigError           a setting, flag or argument that cannot work
│   ├── UnsupportedModelError a model that cannot be split into spans
│   ├── CheckpointError       weights missing, damaged, or in a format that is refused
│   ├── CodecError            values that the chosen codec cannot carry (choose a wider one)
│   ├── SessionClosed         a session or swarm that has ended or is broken: open a new one
│   ├── NotAMember            the private swarm's owner has not listed this node, or has removed it
│   └── RequestRefused        a server says that our request was wrong (it stays healthy: never banned)
├── RemoteError               the peer did wrong: try another one
│   ├── ProtocolViolation     it sent what the protocol forbids
│   │   └── MalformedMessage  a whole frame, but not a message as agreed: the stream can go on
│   │       ├── UnknownMessage      a type of message that this version does not know
│   │       └── UnsupportedVersion  it speaks only protocol versions older than we still do
│   ├── BadRequest            (seen by a server) a client asked for something it may not
│   ├── BadAnswer             (seen by a client) the answer has the wrong shape, dtype, position or values
│   ├── ServerFailed          it reports a failure of its own
│   └── ServerBusy            it has no room now: go elsewhere, come back later, no ban
├── NetworkError              nobody did wrong: try again
│   ├── PeerUnreachable       no address of the peer answered
│   ├── ConnectionLost        the connection or stream ended in the middle
│   ├── RelayRefused          a relay has no room for us, or no way to the peer: try another relay
│   ├── SessionLost           the server ended the session in good order (it stops, or it was idle): go on elsewhere
│   └── DeadlineExceeded      no answer in the time the caller gave
└── SwarmError                the swarm as a whole cannot do it now
    ├── NoPeersError          none of the known peers answers
    ├── ModelNotFound         nobody announces the model
    ├── AdapterNotFound       nobody announces the adapter
    └── MissingBlocksError    no server announces some blocks of the model
"""

from collections.abc import Sequence

from p2pswarm.core.ids import PeerId


class SwarmingError(Exception):
    """Root of everything this library raises on purpose."""


class LocalError(SwarmingError):
    """We misused it."""


class ConfigError(LocalError, ValueError):
    """A setting, flag or argument that cannot work."""


class UnsupportedModelError(LocalError):
    """A model that cannot be split into spans, with the reason."""


class CheckpointError(LocalError):
    """Weights missing, damaged, or in a format that is refused."""


class CodecError(LocalError, ValueError):
    """Values that the chosen codec cannot carry."""


class SessionClosed(LocalError):
    """A session or swarm that has ended or is broken is used further."""


class NotAMember(LocalError):
    """The owner of the private swarm has not listed this node among its members, or has removed it."""


class RequestRefused(LocalError):
    """A server says that our request was wrong."""

    def __init__(self, message: str, peer_id: PeerId | None = None) -> None:
        super().__init__(message)
        self.peer_id = peer_id


class RemoteError(SwarmingError):
    """The peer did wrong."""

    def __init__(self, message: str, peer_id: PeerId | None = None) -> None:
        super().__init__(message)
        self.peer_id = peer_id


class ProtocolViolation(RemoteError):
    """The peer sent what the protocol forbids."""


class MalformedMessage(ProtocolViolation):
    """A whole frame whose message is not as agreed; the stream it came on has not lost its place."""


class UnknownMessage(MalformedMessage):
    """A type of message that this version does not know."""


class UnsupportedVersion(MalformedMessage):
    """The peer speaks only protocol versions older than we still do."""


class BadRequest(RemoteError):
    """A client asked a server for something it may not."""


class BadAnswer(RemoteError):
    """A server's answer has the wrong shape, dtype, position or values."""


class ServerFailed(RemoteError):
    """A server reports a failure of its own."""


class ServerBusy(RemoteError):
    """A server has no room now."""


class NetworkError(SwarmingError):
    """Nobody did wrong."""

    def __init__(self, message: str, peer_id: PeerId | None = None) -> None:
        super().__init__(message)
        self.peer_id = peer_id


class PeerUnreachable(NetworkError):
    """No address of the peer answered."""


class ConnectionLost(NetworkError):
    """The connection or stream ended in the middle."""


class RelayRefused(NetworkError):
    """A relay does not do what we asked of it now; the text says why."""


class SessionLost(NetworkError):
    """The server ended the session in good order: go on elsewhere."""


class DeadlineExceeded(NetworkError, TimeoutError):
    """No answer in the time the caller gave."""


class SwarmError(SwarmingError):
    """The swarm as a whole cannot do it now."""


class NoPeersError(SwarmError):
    """None of the known peers answers."""


class ModelNotFound(SwarmError):
    """Nobody announces the model."""


class AdapterNotFound(SwarmError):
    """Nobody announces the adapter."""


class MissingBlocksError(SwarmError):
    """No server announces some blocks of the model."""

    def __init__(self, message: str, missing: Sequence[tuple[int, int]] = ()) -> None:
        super().__init__(message)
        self.missing = tuple(missing)
        """Half-open block ranges that nobody serves."""
