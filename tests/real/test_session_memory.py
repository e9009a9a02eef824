"""A server process over real sockets: its memory stays flat over a thousand sessions, and its cache comes back."""

import itertools
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import trio

from p2pswarm.checkpoint.checkpoint import open_checkpoint
from p2pswarm.checkpoint.local_model import load_local_model
from p2pswarm.core.errors import ServerBusy, SessionLost
from p2pswarm.core.ids import ModelId, PeerId, SessionId
from p2pswarm.core.span import Span
from p2pswarm.net.host import open_network
from p2pswarm.net.identity import Identity
from p2pswarm.rpc.client import RpcClient
from p2pswarm.testing.tiny_checkpoints import save_tiny_checkpoint
from p2pswarm.wire.codecs import decode_tensor, encode_tensor
from p2pswarm.wire.messages import OpenSession, Step

pytestmark = [pytest.mark.real, pytest.mark.slow]

NUM_SESSIONS = 1000
NUM_WARM_UP = 200
"""After so many, every part of the code has run, and all pages of the cache have been touched."""
AT_ONCE = 12
CACHE_TOKENS = 1024
"""For fewer than half of those at once."""
LONGEST = 160
TIMEOUT_S = 60.0
MIB = 1 << 20
BLOCKS = Span(0, 8)


@contextmanager
def serving(model: Path, folder: Path) -> Iterator[tuple[psutil.Process, dict[str, Any]]]:
    """A server's process, and its event `ready`."""
    flags = ["--host", "127.0.0.1", "--identity", str(folder / "key"), "--threads", "1", "--blocks", str(BLOCKS)]
    cache = ["--kv-cache", f"{CACHE_TOKENS} tokens", "--max-length", str(LONGEST), "--json"]
    command = [sys.executable, "-m", "swarmd", "start", str(model), *flags, *cache]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            events = (json.loads(line) for line in process.stdout)
            yield psutil.Process(process.pid), next(event for event in events if event["event"] == "ready")
        finally:
            process.kill()


class Users:
    """Clients of one process, one session after the other, checked against the local model."""

    def __init__(self, rpc: RpcClient, ready: dict[str, Any], local: Any) -> None:
        self._rpc = rpc
        self._peer_id = PeerId(ready["peer_id"])
        self._model_id = ModelId(ready["model_id"])
        self._local = local
        self._random = random.Random(5)
        self._numbers = itertools.count()

    async def use(self, num_sessions: int) -> None:
        """So many sessions, `AT_ONCE` at a time."""
        numbers = iter(range(num_sessions))

        async def work() -> None:
            for _ in numbers:
                await self._use_one()

        async with trio.open_nursery() as nursery:
            for _ in range(AT_ONCE):
                nursery.start_soon(work)

    async def _use_one(self) -> None:
        prompt, more = self._random.randint(1, 100), self._random.randint(0, 5)
        sent = torch.randn(1, prompt + more, 64)
        abandons = self._random.random() < 0.2
        while True:
            try:
                answers = await self._run(sent, prompt, abandons)
                break
            except SessionLost:
                continue  # evicted: from the start again
            except ServerBusy:
                await trio.sleep(0.05)
        if answers is not None:
            torch.testing.assert_close(answers, local_blocks(self._local, sent), rtol=1e-3, atol=1e-4)

    async def _run(self, sent: torch.Tensor, prompt: int, abandons: bool) -> torch.Tensor | None:
        """The answers to all tokens; None where the session is dropped in the middle."""
        length = sent.shape[1]
        request = OpenSession(
            SessionId(f"session-{next(self._numbers)}"),
            self._model_id,
            BLOCKS,
            length,
            1,
            alloc_timeout_s=TIMEOUT_S,
            first_tokens=prompt,
        )
        async with self._rpc.open_session(self._peer_id, request, 2 * TIMEOUT_S) as session:
            bounds = [0, *range(prompt, length + 1)]
            answers = []
            for step_id, (start, end) in enumerate(itertools.pairwise(bounds)):
                step = Step(step_id, start, encode_tensor(sent[:, start:end].contiguous()))
                if abandons and step_id == 2:
                    await session.send(step)
                    return None
                answers.append(decode_tensor((await session.step(step, TIMEOUT_S)).hidden_states))
        return torch.cat(answers, dim=1)


@torch.inference_mode()
def local_blocks(local: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """What the local model's blocks make of it, before its last norm."""
    taken: list[torch.Tensor] = []
    hook = local.model.norm.register_forward_pre_hook(lambda module, inputs: taken.append(inputs[0]))
    local(inputs_embeds=hidden_states, use_cache=False)
    hook.remove()
    return taken[0]


def test_memory_stays_flat_over_a_thousand_sessions_and_comes_back(tmp_path: Path) -> None:
    folder = save_tiny_checkpoint(tmp_path / "tiny", "llama")
    local = load_local_model(open_checkpoint(str(folder)))

    async def use_all(process: psutil.Process, ready: dict[str, Any]) -> None:
        async with open_network(Identity.generate()) as network:
            peer_id = await network.connect(ready["addresses"][0])
            rpc = RpcClient(network)
            users = Users(rpc, ready, local)
            await users.use(NUM_WARM_UP)
            rss_bytes = process.memory_info().rss
            await users.use(NUM_SESSIONS - NUM_WARM_UP)
            grown_bytes = process.memory_info().rss - rss_bytes
            await trio.sleep(1)
            told = await rpc.info(peer_id, TIMEOUT_S)
            rpc.close()
        assert told.info.cache_tokens_left == ready["cache_tokens"] == CACHE_TOKENS
        assert grown_bytes < 8 * MIB

    with serving(folder, tmp_path) as (process, ready):
        trio.run(use_all, process, ready)
