"""A process that carries out one attack until it is killed. It prints a line when it begins.

python -m simulations.abuse.attack_process "sockets that say nothing" TARGET   (what `processes.py` starts)
"""

import json
import logging
import os
import sys

import trio

from p2pswarm.core.ids import ModelId
from p2pswarm.core.span import Span
from simulations.abuse.attacker import Target
from simulations.abuse.attacks import ATTACKS

NICENESS = 19
"""An attacker computes on a machine of its own: on this one it gets what the others leave over."""


def main() -> None:
    name, described = sys.argv[1:]
    os.nice(NICENESS)
    logging.getLogger("p2pswarm").setLevel(logging.CRITICAL)
    facts = json.loads(described)
    target = Target(
        address=facts["addresses"][0],
        source_host=f"127.1.{os.getpid() // 200 % 200}.{os.getpid() % 200}",  # each attack from a new one
        model_id=ModelId(facts["model_id"]),
        span=Span(facts["start_block"], facts["end_block"]),
        max_length=facts["max_length"],
        cache_tokens=facts["cache_tokens"],
    )
    sys.stdout.write("begun\n")
    sys.stdout.flush()
    trio.run(ATTACKS[name], target)


if __name__ == "__main__":
    main()
