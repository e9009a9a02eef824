"""One generation for the command line: text written as it comes, and how long it took."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import trio

from p2pswarm.client.distributed_model import DistributedModel
from p2pswarm.client.generation import GeneratingSession
from p2pswarm.core.errors import ConfigError
from swarm_cli.report import Timing
from swarm_cli.text_stream import TextStream


@dataclass(frozen=True, slots=True)
class Generated:
    """What came out, without the prompt."""

    token_ids: list[int]
    text: str
    timing: Timing


def encode(model: DistributedModel, prompt: str) -> list[int]:
    """The prompt's token ids as the model's tokenizer makes them."""
    token_ids: list[int] = model.tokenizer(prompt)["input_ids"]
    if not token_ids:
        raise ConfigError("the prompt has no tokens")
    return token_ids


def decode(model: DistributedModel, token_ids: list[int]) -> str:
    """Their text, without special tokens."""
    text = model.tokenizer.decode(token_ids, skip_special_tokens=True)
    assert isinstance(text, str)
    return text


async def generate_text(
    model: DistributedModel,
    session: GeneratingSession,
    prompt_ids: list[int],
    options: dict[str, Any],
    write: Callable[[str], None] = lambda text: None,
) -> Generated:
    """Generates in the session and hands each piece of text to `write` as soon as it is certain."""
    stream = TextStream(partial(decode, model))
    token_ids: list[int] = []
    pieces: list[str] = []
    started_at_s = trio.current_time()
    first_token_after_s = 0.0
    async with session.generate(prompt_ids, **options) as generated_ids:
        async for token_id in generated_ids:
            if not token_ids:
                first_token_after_s = trio.current_time() - started_at_s
            token_ids.append(token_id)
            pieces.append(stream.push(token_id))
            write(pieces[-1])
    total_s = trio.current_time() - started_at_s
    pieces.append(stream.finish())
    write(pieces[-1])
    return Generated(token_ids, "".join(pieces), Timing(len(token_ids), first_token_after_s, total_s))


def write_out(text: str) -> None:
    """To stdout at once."""
    sys.stdout.write(text)
    sys.stdout.flush()
