"""The ids that must never be mixed up: peers, models, sessions, protocols."""

from typing import NewType

PeerId = NewType("PeerId", str)
"""A libp2p peer id in base58 (`12D3KooW...`): the hash of, or for ed25519 the very, public key of a node."""

ModelId = NewType("ModelId", str)
"""`name@fingerprint`: a readable name and 16 hex digits over config and weights, so that two revisions never mix in one
chain."""

SessionId = NewType("SessionId", str)
"""Names one inference session of one client; random, so that a guess does not hit a stranger's session."""

ProtocolId = NewType("ProtocolId", str)
"""What a stream speaks, `/p2pswarm/<what>/<major version>`."""
