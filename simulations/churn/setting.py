"""The swarm that is simulated, and what a call of one of its servers costs: all constants, with units. Arithmetic only.

The setting of the paper's failure table: BLOOM-7.1B, 30 blocks in four stages, each stage on several servers. A call
that runs `new` tokens of a text of `context` tokens through `blocks` blocks takes

    blocks * (block_s + (new - 1) * token_s + context * context_token_s)  +  long_call_s where new > 1

and what travels takes its link's latency and its bytes' time. The four times are fitted: without failures, caching
makes 17.1 and 15.5 steps/s at 128 and 1024 tokens, cache-less 3.44 and 0.92, about what the paper's setting has (not
verified). Everything else that comes out of the simulation is outcome.
"""

from dataclasses import dataclass

from p2pswarm.core.span import Span

STAGES = (Span(0, 8), Span(8, 15), Span(15, 23), Span(23, 30))
NUM_BLOCKS = 30
HANDOVERS_PER_STEP = len(STAGES) + 1
"""From the client to the first stage, from stage to stage, and back to the client.

Five, not four: a step that survives with (1 - p)^5 and restarts that cost nothing but their steps give 0.17 and 0.47
steps/s where the paper has 0.18 (p = 1e-2, 128 tokens) and 0.48 (1e-3, 1024 tokens); with four it would be 0.51, 1.07.
"""

HIDDEN_SIZE = 64
SCALE = 32
"""How much smaller a simulated token is than BLOOM-7.1B's, 4096 numbers of 2 bytes against 64 of 4; its links are as
much slower."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What the servers and links of the simulated swarm are like."""

    num_replicas: int = 3
    """Servers of each stage: "we assume that every block is hosted on several servers"."""
    latency_s: float = 0.001
    """One way, between any two machines."""
    bandwidth_bytes_per_s: float = 125e6
    """Of each link: 1 Gbit/s, in bytes of the real model."""

    block_s: float = 1.625e-3
    """One token through one block."""
    context_token_s: float = 0.45e-6
    """For each token of the text, to read its keys and values in one block."""
    token_s: float = 41e-6
    """Each further token of the same call through one block: 11 TFLOPS, about what the paper's 1080 Ti can do."""
    long_call_s: float = 0.0305
    """More for a call of several tokens, whatever their number."""

    @property
    def simulated_bandwidth_bytes_per_s(self) -> float:
        """In bytes of the simulated model."""
        return self.bandwidth_bytes_per_s / SCALE

    def call_s(self, num_blocks: int, num_new_tokens: int, num_context_tokens: int) -> float:
        """The compute time of one call of a server."""
        block_s = self.block_s + (num_new_tokens - 1) * self.token_s + num_context_tokens * self.context_token_s
        return num_blocks * block_s + (self.long_call_s if num_new_tokens > 1 else 0.0)


PAPER_SETTING = Setting()
