"""A client as a program, to be run somewhere else: `nat_client.py MODEL NUM_TOKENS PROMPT PEER...`.

Prints a JSON line for each token as it comes: which, when, and how its servers are reached just then.
"""

import json
import sys

import torch
import trio

from p2pswarm.client.config import ClientConfig
from p2pswarm.client.swarm import Swarm, open_swarm


async def main(model_path: str, num_tokens: int, prompt: str, peers: list[str]) -> None:
    config = ClientConfig(known_peers_path=None)
    async with open_swarm(peers, config=config) as swarm:
        model = await swarm.load(model_path)
        prompt_ids = model.tokenizer(prompt)["input_ids"]
        async with model.session(max_length=len(prompt_ids) + num_tokens) as session:
            options = {"do_sample": False, "min_new_tokens": num_tokens, "max_new_tokens": num_tokens}
            async for token_id in session.generate(prompt_ids, **options):
                tell(token=int(token_id), at_s=trio.current_time(), relays=relays(swarm, session.route))
        tell(num_recoveries=session.num_recoveries)


def relays(swarm: Swarm, route: object) -> list[str | None]:
    """For each server of the route the relay that leads to it; None where it is reached directly."""
    found = []
    for hop in route.hops:
        path = swarm.network.path(hop.peer_id)
        found.append("nobody" if path is None else path.relay)
    return found


def tell(**values: object) -> None:
    sys.stdout.write(json.dumps(values) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    torch.set_num_threads(1)
    trio.run(main, sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4:])
