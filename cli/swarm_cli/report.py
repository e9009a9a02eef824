"""What a generation was, for people: its route, how fast, what went wrong on the way."""

from collections.abc import Mapping
from dataclasses import dataclass

from rich.console import Console

from p2pswarm.client.session import Session
from p2pswarm.core.ids import PeerId
from p2pswarm.core.server_info import ServerInfo
from swarm_cli.route_words import route_in_words


@dataclass(frozen=True, slots=True)
class Timing:
    """Of one generation; starts when the prompt is handed over, so opening the session counts."""

    num_tokens: int
    time_to_first_token_s: float
    total_s: float

    @property
    def tokens_per_s(self) -> float:
        """After the first token, where there are more; else of the whole."""
        if self.num_tokens > 1 and self.total_s > self.time_to_first_token_s:
            return (self.num_tokens - 1) / (self.total_s - self.time_to_first_token_s)
        return self.num_tokens / self.total_s if self.total_s else 0.0


def print_summary(console: Console, timing: Timing, session: Session, servers: Mapping[PeerId, ServerInfo]) -> None:
    """The route and the speed, on two lines, and how often servers had to be replaced."""
    console.print(f"[dim]route[/] {route_in_words(session.route, servers)}", highlight=False, soft_wrap=True)
    recoveries = f", {session.num_recoveries} recoveries from failed servers" if session.num_recoveries else ""
    console.print(
        f"[dim]speed[/] {timing.tokens_per_s:.1f} tokens/s, first token after {timing.time_to_first_token_s:.2f} s, "
        f"{timing.num_tokens} tokens{recoveries}",
        highlight=False,
        soft_wrap=True,
    )
