"""Talking with a model: its chat template, and one session that keeps what was said."""

import sys
from typing import Any

import trio
from rich.console import Console

from p2pswarm.client.distributed_model import DistributedModel
from p2pswarm.client.generation import GeneratingSession
from p2pswarm.core.errors import ConfigError
from swarm_cli.report import print_summary
from swarm_cli.writing import generate_text, write_out

Message = dict[str, str]

LONGEST_TALK_TOKENS = 4096
"""Room asked of the servers for a whole conversation, where model and servers take as many."""


def encode_chat(model: DistributedModel, prompt: str) -> list[int]:
    """The token ids of one message in the model's chat template, up to where the answer begins."""
    return _encode(model, [{"role": "user", "content": prompt}])


async def talk(model: DistributedModel, options: dict[str, Any]) -> None:
    """Message and answer in turn, until the input ends (Ctrl-D)."""
    console = Console(stderr=True)
    console.print("[dim]Talk to the model; Ctrl-D ends.[/]")
    messages: list[Message] = []
    async with model.session(max_length=longest_talk(model)) as session:
        while (said := await _read_line(console)) is not None:
            if not said.strip():
                continue
            messages.append({"role": "user", "content": said.strip()})
            new_ids = continue_session(session, _encode(model, messages))
            answer = await generate_text(model, session, new_ids, options, write_out)
            print(flush=True)
            print_summary(console, answer.timing, session, model.servers.known)
            messages.append({"role": "assistant", "content": answer.text})


def continue_session(session: GeneratingSession, token_ids: list[int]) -> list[int]:
    """Takes the session back to where `token_ids` agree with what it holds; the tokens from there on.

    A template may write an answer differently from how the model gave it, so that the last turn is partly run again.
    """
    held = [] if session.history is None else session.history.token_ids[0].tolist()
    agreeing = next((i for i, (a, b) in enumerate(zip(held, token_ids, strict=False)) if a != b), len(held))
    session.position = min(agreeing, session.position, len(token_ids) - 1)
    return token_ids[session.position :]


def longest_talk(model: DistributedModel) -> int:
    """As many tokens as the model, its servers and `LONGEST_TALK_TOKENS` allow."""
    context: int | None = getattr(
        model.checkpoint.config.get_text_config(decoder=True), "max_position_embeddings", None
    )
    limits = [server.max_length for server in model.servers.online.values()]
    longest = min(limit for limit in (LONGEST_TALK_TOKENS, context, *limits) if limit)
    prefix = model.carried().prefix  # of a tuned prompt
    return longest if prefix is None else longest - prefix.shape[0]


def _encode(model: DistributedModel, messages: list[Message]) -> list[int]:
    if not model.tokenizer.chat_template:
        raise ConfigError(
            f"{model.checkpoint.name} has no chat template: leave --chat out and give it text to go on from"
        )
    tokenizer: Any = model.tokenizer
    token_ids: list[int] = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    return token_ids


async def _read_line(console: Console) -> str | None:
    """A line typed at the terminal; None at its end. Waits in the loop, so that an interrupt is noticed at once."""
    console.print("[bold]> [/]", end="")
    await trio.lowlevel.wait_readable(sys.stdin)
    line = sys.stdin.readline()  # a terminal is readable when a whole line has been typed
    return line or None
