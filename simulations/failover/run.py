"""Does a user see the same text when the servers that make it are killed or stopped all the time, and how long is the
pause?

    python -m simulations.failover.run --generations 20 --seed 1

Method. SmolLM2-135M in three spans of ten blocks, each served by two `swarmd` processes with one torch thread. Greedy
generations of 128 tokens, one session each; about every 40 tokens one of the three processes in use is struck down,
whichever it is: first with SIGKILL (it starts again 3 s later), then all of it again with SIGSTOP (SIGCONT after 12 s).
The tokens are compared with the local model's. Then, 512 tokens into a text, each span's server is struck once, and
the time until the next token is set beside that of one prefill of the span.

Exits 1 when a token differs, when an error reaches the caller, or when a recovery takes longer than 1.5 prefills plus
0.5 s (after SIGSTOP: and the step deadline).
"""

import argparse
import logging
import sys

import torch
import trio

from p2pswarm.client.config import ClientConfig
from p2pswarm.client.swarm import open_swarm
from p2pswarm.core.span import Span
from simulations.failover.generations import Plan, Strike, generate_all, local_answers
from simulations.failover.processes import ReplicasPlan, open_replicas
from simulations.failover.recovery import all_allowed, measure_recovery
from swarm_cli.sample_model import sample_model

SPANS = (Span(0, 10), Span(10, 20), Span(20, 30))
POSITION = 512


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generations", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--log", action="store_true", help="tell of each recovery as it happens")
    flags = parser.parse_args()
    if flags.log:
        logging.basicConfig(stream=sys.stderr, format="%(asctime)s %(message)s")
        logging.getLogger("p2pswarm.client").setLevel(logging.INFO)
    plan = Plan(flags.generations, seed=flags.seed)
    print((__doc__ or "").split("\n\n")[0])
    print(f"\n{plan}\n")
    torch.set_num_threads(1)  # as the servers: sums are then made in the same order
    is_good = trio.run(simulate, sample_model(), plan)
    return 0 if is_good else 1


async def simulate(model_path: str, plan: Plan) -> bool:
    """Prints what comes out; whether all of it is as it should be."""
    answers = await trio.to_thread.run_sync(local_answers, model_path, plan)
    config = ClientConfig(known_peers_path=None)
    async with (
        open_replicas(ReplicasPlan(model_path, SPANS)) as replicas,
        open_swarm(replicas.addresses, config=config) as swarm,
    ):
        model = await swarm.load(model_path)
        outcomes = []
        for strike in Strike:
            outcomes.append(await generate_all(model, replicas, answers, strike, plan))
            print(outcomes[-1])
            for error in outcomes[-1].errors:
                print(f"    {error}")
        print(f"\nat position {POSITION}:")
        costs = []
        for strike in Strike:
            for span in SPANS:
                cost = await measure_recovery(
                    swarm,
                    model,
                    replicas,
                    strike,
                    span,
                    position=POSITION,
                    step_deadline_s=config.min_step_timeout_s + config.ping_timeout_s,
                )
                print(cost)
                costs.append(cost)
    return all(outcome.is_perfect for outcome in outcomes) and all_allowed(costs)


if __name__ == "__main__":
    sys.exit(main())
