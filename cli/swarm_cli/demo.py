"""`swarm demo`: server processes on this machine, found through their DHT, write text together."""

import argparse
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import trio
from rich.console import Console

from p2pswarm.checkpoint.checkpoint import open_checkpoint
from p2pswarm.checkpoint.local_model import load_local_model
from p2pswarm.client.config import ClientConfig
from p2pswarm.client.distributed_model import DistributedModel
from p2pswarm.client.swarm import open_swarm
from p2pswarm.core.errors import BadAnswer
from swarm_cli.local_swarm import LocalSwarmPlan, ServerProcess, local_swarm, split_evenly
from swarm_cli.report import print_summary
from swarm_cli.run_async import run_async
from swarm_cli.sample_model import sample_model
from swarm_cli.sampling import GREEDY
from swarm_cli.weights_bar import weights_bar
from swarm_cli.writing import encode, generate_text, write_out


def run(arguments: argparse.Namespace) -> int:
    """The whole command; its exit status."""
    return run_async(partial(_demo, arguments, Console(stderr=True, highlight=False, soft_wrap=True)))


async def _demo(arguments: argparse.Namespace, console: Console) -> int:
    torch.set_num_threads(arguments.threads)
    model = arguments.model or sample_model()
    with weights_bar(console) as listener:
        checkpoint = await trio.to_thread.run_sync(partial(open_checkpoint, model, listener=listener))
    plan = LocalSwarmPlan(model, split_evenly(checkpoint.num_blocks, arguments.servers), arguments.threads)

    def on_event(server: ServerProcess, event: dict[str, Any]) -> None:
        if event["event"] == "ready":
            console.print(f"[green]ready[/] {event['peer_id']} serves blocks {server.span} of {checkpoint.num_blocks}")

    console.print(f"Starting {len(plan.spans)} servers of {checkpoint.name} on this machine …")
    async with local_swarm(plan, on_event) as servers:
        peers = [address for server in servers for address in server.addresses]
        return await _write(model, peers, arguments, console)


async def _write(model: str, peers: Sequence[str], arguments: argparse.Namespace, console: Console) -> int:
    async with open_swarm(peers, config=ClientConfig(known_peers_path=None)) as swarm:
        distributed = await swarm.load(model)
        prompt_ids = encode(distributed, arguments.prompt)
        options = GREEDY | {"max_new_tokens": arguments.max_new_tokens}
        write_out(f"\n{arguments.prompt}")
        async with distributed.session(max_length=len(prompt_ids) + arguments.max_new_tokens) as session:
            generated = await generate_text(distributed, session, prompt_ids, options, write_out)
            write_out("\n\n")
            print_summary(console, generated.timing, session, distributed.servers.known)
        if arguments.verify:
            await _verify(distributed, prompt_ids, options, generated.token_ids)
            console.print(f"[green]verified[/] the local model gives the same {len(generated.token_ids)} tokens")
    return 0 if generated.text.strip() else 1


async def _verify(
    distributed: DistributedModel, prompt_ids: list[int], options: dict[str, Any], token_ids: list[int]
) -> None:
    """Raises `BadAnswer` where the local model gives other tokens."""

    def generate_locally() -> list[int]:
        local: Any = load_local_model(distributed.checkpoint, distributed.shell.dtype)
        sequences = local.generate(torch.tensor([prompt_ids]), **options)
        tokens: list[int] = sequences[0, len(prompt_ids) :].tolist()
        return tokens

    expected = await trio.to_thread.run_sync(generate_locally)
    if token_ids != expected:
        raise BadAnswer(f"the swarm's tokens {token_ids} are not the local model's {expected}")
