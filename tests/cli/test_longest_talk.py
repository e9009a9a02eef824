"""How long a talk may get: what the model, its servers and a tuned prompt leave."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from p2pswarm.client.carried import NOTHING, Carried
from swarm_cli.chat import LONGEST_TALK_TOKENS, longest_talk


@pytest.mark.parametrize(
    ("context", "server_lengths", "carried", "expected"),
    [
        (512, [4096, 300], NOTHING, 300),
        (256, [4096, 300], NOTHING, 256),
        (None, [0], NOTHING, LONGEST_TALK_TOKENS),
        (512, [300], Carried(prefix=torch.zeros(16, 64)), 284),
    ],
)
def test_a_talk_is_as_long_as_all_allow(
    context: int | None, server_lengths: list[int], carried: Carried, expected: int
) -> None:
    text_config = SimpleNamespace(max_position_embeddings=context)
    servers = {number: SimpleNamespace(max_length=length) for number, length in enumerate(server_lengths)}
    model: Any = SimpleNamespace(
        checkpoint=SimpleNamespace(config=SimpleNamespace(get_text_config=lambda decoder: text_config)),
        servers=SimpleNamespace(online=servers),
        carried=lambda: carried,
    )
    assert longest_talk(model) == expected
