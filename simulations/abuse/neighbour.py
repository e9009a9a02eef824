"""An honest client beside the attackers: its tokens, how fast they come, and whether another one still gets in."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import trio

from p2pswarm.client.distributed_model import DistributedModel
from p2pswarm.core.errors import SwarmingError
from p2pswarm.net.host import open_network
from p2pswarm.net.identity import Identity


@dataclass(slots=True)
class Neighbour:
    """A session that generates greedily, for as long as it is let."""

    expected: Sequence[int]
    """What the local model makes of the prompt: longer than any test takes."""
    token_ids: list[int] = field(default_factory=list)
    came_at_s: list[float] = field(default_factory=list)
    num_recoveries: int = 0

    async def generate(self, model: DistributedModel, prompt: Sequence[int]) -> None:
        """Until cancelled, or all that is expected has come."""
        num_tokens = len(self.expected)
        async with model.session(max_length=len(prompt) + num_tokens) as session:
            tokens = session.generate(
                list(prompt), do_sample=False, max_new_tokens=num_tokens, min_new_tokens=num_tokens
            )
            async for token_id in tokens:
                self.token_ids.append(token_id)
                self.came_at_s.append(trio.current_time())
                self.num_recoveries = session.num_recoveries

    @property
    def is_exact(self) -> bool:
        return self.token_ids == list(self.expected[: len(self.token_ids)])

    def tokens_per_s(self, start_s: float, end_s: float) -> float:
        return sum(start_s <= came_at_s < end_s for came_at_s in self.came_at_s) / (end_s - start_s)


async def seconds_to_get_in(address: str) -> float:
    """For one more honest client; a minute where it does not get in at all."""
    began_at_s = trio.current_time()
    with trio.move_on_after(60.0):
        while True:
            async with open_network(Identity.generate()) as network:
                try:
                    await network.connect(address)
                    break
                except SwarmingError:
                    await trio.sleep(0.5)
    return trio.current_time() - began_at_s
