"""How a client behaves: deadlines, bans, which servers, how tensors travel. One frozen object, checked once."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import platformdirs

from p2pswarm.core.errors import ConfigError
from p2pswarm.core.ids import PeerId
from p2pswarm.core.quantization import Quantization
from p2pswarm.routing.costs import CostModel
from p2pswarm.wire.messages import MAX_ALLOC_TIMEOUT_S, Codec


def default_known_peers_path() -> Path:
    """Where a client remembers whom it met, so that it finds the swarm again without its bootstrap peer."""
    return Path(platformdirs.user_cache_dir("p2pswarm")) / "client-peers.json"


@dataclass(frozen=True, slots=True)
class ClientConfig:
    """Options of `open_swarm`."""

    known_peers_path: Path | None = field(default_factory=default_known_peers_path)
    """None: remember nobody."""
    join_timeout_s: float = 10.0
    """For the first answer of any known peer."""
    find_timeout_s: float = 5.0
    """For finding the servers of a model."""
    update_period_s: float = 30.0
    """Between looks at who serves a model; failures are noticed at once."""
    open_timeout_s: float = 15.0
    """For opening a session at one server: a dial, three round trips and its wait for room."""
    alloc_timeout_s: float = 0.0
    """How long to wait at a server that has no room in its KV cache; 0: another server is tried at once."""
    min_step_timeout_s: float = 3.0
    """A server that takes longer, and four times as long as usual, is asked whether it is alive."""
    step_timeout_s: float = 60.0
    """For the answer of a server that is alive but busy; a long prompt gets `step_timeout_per_token_s` more."""
    step_timeout_per_token_s: float = 0.25
    """For each token of each sequence of a step; a slow CPU server runs 20 blocks of a 7B model in about that."""
    max_step_bytes: int = 32 << 20
    """Hidden states of one step; longer prompts go in parts. Servers take frames of 64 MiB."""
    max_training_tokens: int = 1024
    """Of a call without a session, forward or backward: larger batches are cut into sub-batches of whole rows, which
    go by different servers at once; smaller ones too, for `max_training_calls` of some hundred tokens."""
    max_training_calls: int = 6
    """Sub-batches of one batch under way at once. Fewer than the servers of a chain leave some of them idle; a server
    has room for eight waiting calls of one client."""
    stop_grace_s: float = 2.0
    """How long a stopped generation may finish the step it is in; after that the session is lost."""
    recovery_timeout_s: float = 60.0
    """How long other servers are looked for, or waited for, after a first failure in a step."""
    max_retries: int | None = None
    """Failures of servers in a step that are answered by another try; None: any number until `recovery_timeout_s`."""
    max_history_bytes: int = 4 << 30
    """Of a session's inputs kept for replays. Beyond it, a lost server costs the replay of servers before it too."""
    history_dtype: Literal["float16", "bfloat16"] | None = None
    """None: as sent. Half precision saves memory, and makes what follows a recovery inexact."""
    use_push: bool = True
    """Servers hand on to each other what they can; the client relays the rest."""
    ban_s: float = 15.0
    """How long a failed server is left out of new routes; twice as long each further time."""
    ping_timeout_s: float = 2.0
    max_pinged: int = 12
    """Servers whose round trip is measured before the first route."""
    codec: Codec = Codec.NONE
    """For hidden states, both ways. Other than NONE loses bits: the answers are no longer exactly the local model's."""
    allowed_servers: frozenset[PeerId] | None = None
    """None: any server."""
    blocked_servers: frozenset[PeerId] = frozenset()
    quantization: frozenset[Quantization] | None = None
    """Only servers that announce one of these; None: any. With NONE alone, the answers are the local model's."""
    local_blocks: int = 0
    """Of the model's first blocks, and as many of its last ones, that are run here, so that servers see neither the
    embeddings of the text nor what is next to its answer. They take memory and time here."""
    active_adapter: str | None = None
    """Adapter of sessions and forward passes that are not given one: a LoRA adapter that servers have, or a folder here
    that goes along with them. None: none."""
    costs: CostModel = field(default_factory=CostModel)

    def timeout_s(self, num_tokens: int) -> float:
        """The deadline of one server's answer to that many tokens, over all sequences."""
        return self.step_timeout_s + self.step_timeout_per_token_s * num_tokens

    def __post_init__(self) -> None:
        for name in (
            "join_timeout_s",
            "find_timeout_s",
            "update_period_s",
            "open_timeout_s",
            "min_step_timeout_s",
            "step_timeout_s",
            "ban_s",
        ):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} is a number of seconds above 0, got {getattr(self, name)}")
        if not 0 <= self.alloc_timeout_s <= MAX_ALLOC_TIMEOUT_S:
            raise ConfigError(
                f"alloc_timeout_s is a number of seconds from 0 to {MAX_ALLOC_TIMEOUT_S:g}, got {self.alloc_timeout_s}"
            )
        if self.recovery_timeout_s < 0:
            raise ConfigError(f"recovery_timeout_s is a number of seconds, 0 or more, got {self.recovery_timeout_s}")
        for name in ("max_training_tokens", "max_training_calls"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is 1 or more, got {getattr(self, name)}")
        if self.local_blocks < 0:
            raise ConfigError(f"local_blocks is a number of blocks, 0 or more, got {self.local_blocks}")
        if self.max_retries is not None and self.max_retries < 0:
            raise ConfigError(f"max_retries is 0 or more, or None, got {self.max_retries}")
