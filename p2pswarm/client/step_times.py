"""How long a server needs for its steps, and so how long to wait for the next one. Arithmetic only.

Short steps (a token or a few) follow the rule of TCP's retransmission timer (RFC 6298): a smoothed mean and a smoothed
deviation. Long ones, prompts and replays, are judged by the time a token. Before the first step of a kind, what the
server announces stands in.
"""

from p2pswarm.core.server_info import ServerInfo

SHORT_STEP_TOKENS = 16
MEAN_GAIN, DEVIATION_GAIN = 1 / 8, 1 / 4
ALLOWANCE = 4.0
"""A server is late after that many times what it usually takes."""
SLOW_PATH_BYTES_PER_S = 250_000
"""Assumed until a step has been measured: 2 Mbit/s."""


class StepTimes:
    """Of one server, for one span."""

    def __init__(self) -> None:
        self._mean_s: float | None = None
        self._deviation_s = 0.0
        self._token_s: float | None = None

    def note(self, num_tokens: int, elapsed_s: float) -> None:
        """A step of `num_tokens` (over all sequences) was answered after `elapsed_s`."""
        if num_tokens > SHORT_STEP_TOKENS:
            token_s = elapsed_s / num_tokens
            self._token_s = token_s if self._token_s is None else self._token_s + (token_s - self._token_s) / 2
        elif self._mean_s is None:
            self._mean_s, self._deviation_s = elapsed_s, elapsed_s / 2
        else:
            self._deviation_s += DEVIATION_GAIN * (abs(elapsed_s - self._mean_s) - self._deviation_s)
            self._mean_s += MEAN_GAIN * (elapsed_s - self._mean_s)

    def expected_s(self, num_tokens: int, declared_s: float) -> float:
        """What such a step will take; `declared_s` is what it would by the server's own announcement."""
        if num_tokens <= SHORT_STEP_TOKENS:
            return declared_s if self._mean_s is None else self._mean_s
        return declared_s if self._token_s is None else max(self._token_s * num_tokens, self._mean_s or 0.0)

    def late_after_s(self, num_tokens: int, declared_s: float, min_s: float) -> float:
        """When to doubt that an answer will come; at least `min_s`."""
        expected_s = self.expected_s(num_tokens, declared_s)
        return max(min_s, ALLOWANCE * (expected_s + self._deviation_s))


def declared_step_s(server: ServerInfo, num_blocks: int, num_tokens: int, num_bytes: int, round_trip_s: float) -> float:
    """What a step takes by the rates that the server announces; the way there and back where it announces none."""
    rate = server.forward_tokens_per_s if num_tokens > SHORT_STEP_TOKENS else server.inference_tokens_per_s
    compute_s = num_tokens * num_blocks / rate if rate > 0 else 0.0
    return round_trip_s + num_bytes / SLOW_PATH_BYTES_PER_S + server.queue_delay_s + compute_s
