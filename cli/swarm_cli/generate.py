"""`swarm generate`: text from a swarm, streamed as it comes."""

import argparse
import json
import sys
from functools import partial
from typing import Any

import torch
from rich.console import Console

from p2pswarm.client.config import ClientConfig
from p2pswarm.client.distributed_model import DistributedModel
from p2pswarm.client.generation import GeneratingSession
from p2pswarm.client.swarm import open_swarm
from p2pswarm.core.errors import ConfigError
from p2pswarm.core.quantization import Quantization
from p2pswarm.wire.messages import Codec
from swarm_cli.chat import encode_chat, talk
from swarm_cli.entrance import entrance
from swarm_cli.report import print_summary
from swarm_cli.route_words import route_as_json
from swarm_cli.run_async import run_async
from swarm_cli.sampling import sampling_options
from swarm_cli.weights_bar import weights_bar
from swarm_cli.writing import Generated, encode, generate_text, write_out


def run(arguments: argparse.Namespace) -> int:
    """The whole command; its exit status."""
    prompt = arguments.prompt
    wants_talk = arguments.chat and prompt is None and not arguments.json and sys.stdin.isatty()
    if prompt is None and not wants_talk:
        prompt = sys.stdin.read()
    if prompt is not None and not prompt.strip():
        raise ConfigError("the prompt is empty: give one as an argument or on stdin")
    return run_async(partial(_generate, arguments, prompt))


async def _generate(arguments: argparse.Namespace, prompt: str | None) -> int:
    config = ClientConfig(
        codec=Codec(arguments.compression),
        quantization=frozenset({Quantization.NONE}) if arguments.exact else None,
        active_adapter=arguments.adapter,
        local_blocks=arguments.local_blocks,
    )
    async with open_swarm(arguments.peers, config=config, **entrance(arguments)) as swarm:
        with weights_bar(Console(stderr=True)) as listener:
            model = await swarm.load(
                arguments.model,
                dtype=None if arguments.dtype is None else getattr(torch, arguments.dtype),
                revision=arguments.revision,
                token=arguments.token,
                cache_dir=arguments.cache_dir,
                listener=listener,
            )
        options = sampling_options(arguments.temperature, arguments.top_p)
        options["max_new_tokens"] = arguments.max_new_tokens
        if arguments.seed is not None:
            torch.manual_seed(arguments.seed)
        if prompt is None:
            await talk(model, options)
        else:
            prompt_ids = encode_chat(model, prompt) if arguments.chat else encode(model, prompt)
            await _answer_once(model, prompt_ids, options, as_json=arguments.json)
    return 0


async def _answer_once(model: DistributedModel, prompt_ids: list[int], options: dict[str, Any], as_json: bool) -> None:
    async with model.session(max_length=len(prompt_ids) + options["max_new_tokens"]) as session:
        if as_json:
            generated = await generate_text(model, session, prompt_ids, options)
            print(json.dumps(json_answer(model, session, len(prompt_ids), generated)))
        else:
            generated = await generate_text(model, session, prompt_ids, options, write_out)
            print(flush=True)
            print_summary(Console(stderr=True), generated.timing, session, model.servers.known)


def json_answer(
    model: DistributedModel, session: GeneratingSession, num_prompt_tokens: int, generated: Generated
) -> dict[str, Any]:
    """What `--json` prints."""
    return {
        "token_ids": generated.token_ids,
        "text": generated.text,
        "route": route_as_json(session.route, model.servers.known),
        "time_to_first_token_s": round(generated.timing.time_to_first_token_s, 4),
        "tokens_per_s": round(generated.timing.tokens_per_s, 3),
        "model_id": model.model_id,
        "num_prompt_tokens": num_prompt_tokens,
        "total_s": round(generated.timing.total_s, 4),
        "num_recoveries": session.num_recoveries,
    }
