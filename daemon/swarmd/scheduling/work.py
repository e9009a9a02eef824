"""What waits for the device, and the part of it that runs next. Plain data; read `scheduler.py` next."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from enum import Enum

from p2pswarm.core.ids import PeerId


class Kind(Enum):
    """In the order of their priority where nothing else decides."""

    DECODE = "decode"
    """One more token of each of a session's rows: somebody watches it come. Steps of many sessions run as one batch."""
    PREFILL = "prefill"
    """Many tokens of a session at once, a prompt or a replay; may be cut after any token."""
    FORWARD = "forward"
    """Rows without a session, as in training; may be cut after any row, long rows after any token."""
    BACKWARD = "backward"
    """Gradients of such rows; may be cut after any row, and for some rows at a time after any of several stages."""

    @property
    def queue(self) -> "Kind":
        """With which kind it waits and shares its time."""
        return Kind.FORWARD if self is Kind.BACKWARD else self


@dataclass(slots=True, eq=False)
class Work:
    """One request of a peer, and how much of it is done."""

    kind: Kind
    peer_id: PeerId
    num_rows: int
    num_tokens: int
    """Of each row."""
    arrived_s: float
    session: int | None = None
    """Whose decode step it is."""
    batch_key: Hashable | None = None
    """Decode steps with equal keys may run as one batch; None: this one runs alone."""
    num_stages: int = 1
    """Of a backward pass: each takes about as long as the others."""
    stage_passes: float = 1.0
    """To how many passes of its rows through all blocks of the server a stage amounts."""
    max_rows: int | None = None
    """Of a backward pass: how many rows may be under way, for which there is memory; None: all of them."""
    rows_done: int = 0
    """Of a forward or backward pass."""
    tokens_done: int = 0
    """Of each row, or of the first row that is not done."""
    rows_begun: int = 0
    """Of a backward pass: as many rows have gone through some stages, and not yet through all."""
    stages_done: int = 0
    """Of those rows."""
    is_given_up: bool = False
    """Nobody waits for it any more."""

    @property
    def is_done(self) -> bool:
        return self.rows_done == self.num_rows or (
            self.kind.queue is not Kind.FORWARD and self.tokens_done == self.num_tokens
        )

    def advance(self, part: "Part") -> None:
        """Notes that the part has run."""
        if self.kind is Kind.BACKWARD:
            self.rows_begun, self.stages_done = part.num_rows, self.stages_done + part.num_stages
            if self.stages_done == self.num_stages:
                self.rows_done += part.num_rows
                self.rows_begun = self.stages_done = 0
            return
        self.tokens_done += part.num_tokens
        if self.kind is Kind.FORWARD and self.tokens_done == self.num_tokens:
            self.rows_done += part.num_rows
            self.tokens_done = 0


@dataclass(frozen=True, slots=True)
class Part:
    """What runs next on the device: a batch of decode steps, or a part of something longer."""

    works: tuple[Work, ...]
    """One, but for decode steps."""
    num_rows: int
    """In total."""
    num_tokens: int
    """Of each row."""
    num_stages: int = 1
    """The next ones of its work."""

    @property
    def kind(self) -> Kind:
        return self.works[0].kind

    @property
    def num_finished_tokens(self) -> int:
        """Over all rows, asked before the work advances: those of a backward pass are finished with its last stage."""
        work = self.works[0]
        is_last = work.stages_done + self.num_stages == work.num_stages
        return self.num_rows * self.num_tokens if is_last else 0

    @property
    def num_token_passes(self) -> float:
        """Over all rows, through all blocks of the server; one of ten blocks for ten tokens is one."""
        return self.num_rows * self.num_tokens * self.num_stages * self.works[0].stage_passes

    def of(self, works: Sequence[Work]) -> "Part":
        """The same for just these of its works."""
        if len(works) == len(self.works):
            return self
        return replace(self, works=tuple(works), num_rows=sum(work.num_rows for work in works))
