"""A private swarm of processes: its key, its members, and what becomes of those who are removed."""

import json
import sys
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import trio
from tiny_servers import run_swarm

from p2pswarm.checkpoint.checkpoint import open_checkpoint
from p2pswarm.checkpoint.local_model import load_local_model
from p2pswarm.client.config import ClientConfig
from p2pswarm.client.portal import Portal
from p2pswarm.client.single_error import single_error
from p2pswarm.client.swarm import open_swarm
from p2pswarm.core.errors import NotAMember, ServerFailed
from p2pswarm.core.ids import PeerId
from p2pswarm.core.span import Span
from p2pswarm.net.identity import Identity
from p2pswarm.net.private.member_list import MemberList
from p2pswarm.net.private.swarm_key import SwarmKey
from p2pswarm.testing.tiny_checkpoints import save_tiny_checkpoint, save_tiny_tokenizer
from simulations.private_swarm.run import compare
from swarm_cli.local_swarm import LocalSwarmPlan, ServerProcess, local_swarm

pytestmark = [pytest.mark.real, pytest.mark.slow]

SPANS = (Span(0, 3), Span(3, 8))
PROMPT = "w5 w17 w99"
PROMPT_IDS = [5, 17, 99]
START_TIMEOUT_S = 120.0
"""Of two servers, beside other tests."""
REMOVED_WITHIN_S = 20.0
"""Two seconds until the file is looked at again, and a step over processes that share two cores with other tests."""


@dataclass(frozen=True)
class PrivateServers:
    """Server processes of one private swarm, all with the same file of members."""

    folder: Path
    key_path: Path
    identities: tuple[Identity, ...]
    processes: tuple[ServerProcess, ...]

    @property
    def key(self) -> SwarmKey:
        return SwarmKey.load(self.key_path)

    @property
    def model(self) -> str:
        return str(self.folder / "tiny-llama")


class Swarmers:
    """The people: an owner with his list, and whoever is on it."""

    def __init__(self, folder: Path) -> None:
        self.owner = Identity.generate()
        self.key_path = folder / "swarm.key"
        self.members_path = folder / "members"
        SwarmKey.generate(self.owner).save(self.key_path)
        self._version = 0

    def list_members(self, peer_ids: Iterable[PeerId]) -> None:
        self._version += 1
        self.members_path.write_bytes(MemberList.sign(self.owner, self._version, peer_ids).text)


@asynccontextmanager
async def private_servers(folder: Path, people: Swarmers, others: Iterable[PeerId]) -> AsyncIterator[PrivateServers]:
    """Two servers and `others` are the members. The servers are ready."""
    save_tiny_tokenizer(save_tiny_checkpoint(folder / "tiny-llama", "llama", eos_token_id=None))
    identities = tuple(Identity.load_or_create(folder / f"server-{number}") for number in range(len(SPANS)))
    people.list_members([*(identity.peer_id for identity in identities), *others])
    peers: list[str] = []
    processes: list[ServerProcess] = []
    async with trio.open_nursery() as nursery:
        with trio.fail_after(START_TIMEOUT_S):
            for number, span in enumerate(SPANS):
                command = start_command(folder, people, span, folder / f"server-{number}", peers)
                processes.append(ServerProcess(command, span))
                await nursery.start(processes[-1].run, lambda server, event: None)
                peers = list(processes[0].addresses)
        yield PrivateServers(folder, people.key_path, identities, tuple(processes))
        nursery.cancel_scope.cancel()


def start_command(folder: Path, people: Swarmers, span: Span, identity: Path, peers: list[str]) -> list[str]:
    options = {
        "--blocks": str(span),
        "--host": "127.0.0.1",
        "--identity": str(identity),
        "--threads": "1",
        "--throughput": "1",
        "--swarm-key": str(people.key_path),
        "--members": str(people.members_path),
    }
    flags = [word for name, value in options.items() for word in (name, value)]
    joining = ["--peers", *peers] if peers else []
    model = str(folder / "tiny-llama")
    return [sys.executable, "-m", "swarmd", "start", model, "--json", "--stop-with-stdin", *flags, *joining]


def local_tokens(model: str, num_tokens: int) -> list[int]:
    local: Any = load_local_model(open_checkpoint(model))
    sequences = local.generate(torch.tensor([PROMPT_IDS]), max_new_tokens=num_tokens, do_sample=False)
    return list(sequences[0, len(PROMPT_IDS) :].tolist())


async def test_removed_user_and_removed_server_stop_and_say_why(tmp_path: Path) -> None:
    people, user = Swarmers(tmp_path), Identity.generate()
    second = Identity.load_or_create(tmp_path / "server-1").peer_id

    async def remove_user_then_server() -> None:
        async with private_servers(tmp_path, people, [user.peer_id]) as servers:
            with pytest.raises(NotAMember, match=f"{user.peer_id}, this node, is not a member"):
                await generate_until_removed(user, people, servers)
            people.list_members([servers.identities[0].peer_id])
            with trio.fail_after(REMOVED_WITHIN_S):
                await trio.sleep_forever()

    with pytest.raises(ServerFailed, match=f"{second}, this node, is not a member"), single_error():
        await remove_user_then_server()


async def generate_until_removed(user: Identity, people: Swarmers, servers: PrivateServers) -> None:
    config = ClientConfig(known_peers_path=None)
    peers = servers.processes[0].addresses
    async with open_swarm(peers, identity=user, config=config, swarm_key=servers.key) as swarm:
        model = await swarm.load(servers.model)
        async with model.session(max_length=200) as session:
            tokens = session.generate(PROMPT_IDS, max_new_tokens=190, do_sample=False)
            assert [await anext(tokens) for _ in range(6)] == local_tokens(servers.model, 6)
            people.list_members(identity.peer_id for identity in servers.identities)
            with trio.fail_after(REMOVED_WITHIN_S):
                async for _ in tokens:
                    await trio.sleep(0.1)


async def test_open_and_private_swarm_decode_the_same_tokens(tmp_path: Path) -> None:
    save_tiny_tokenizer(save_tiny_checkpoint(tmp_path / "tiny-llama", "llama", eos_token_id=None))
    found = await compare(str(tmp_path / "tiny-llama"), num_servers=2, num_rounds=1, num_tokens=16)
    assert found.are_same
    assert len(found.ratios) == 1


def test_key_invitation_and_text_as_people_use_them(tmp_path: Path) -> None:
    key_path, model = tmp_path / "choir.key", str(tmp_path / "tiny-llama")
    save_tiny_tokenizer(save_tiny_checkpoint(tmp_path / "tiny-llama", "llama", eos_token_id=None))
    assert run_swarm("keygen", str(key_path), home=tmp_path).returncode == 0
    with Portal() as portal:
        plan = LocalSwarmPlan(model, SPANS, threads=1, swarm_key=key_path)
        addresses = portal.enter(local_swarm(plan)).value[0].addresses
        invited = run_swarm("invite", "--swarm-key", str(key_path), "--peers", *addresses, home=tmp_path)
        generating = ["generate", model, PROMPT, "--max-new-tokens", "6", "--temperature", "0", "--json"]
        member = run_swarm(*generating, "--peers", invited.stdout.strip(), home=tmp_path)
        stranger = run_swarm("status", "--peers", *addresses, home=tmp_path)
    assert json.loads(member.stdout)["token_ids"] == local_tokens(model, 6)
    assert (stranger.returncode, stranger.stdout) == (1, "")
    assert "it belongs to a private swarm, whose key is needed (--swarm-key)" in stranger.stderr
    assert "tiny-llama" not in stranger.stderr
