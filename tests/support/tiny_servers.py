"""Two server processes that share a tiny model, and the `swarm` command as users run it: a process of its own.

The tests of a process that only use such a swarm use the same one: to start it takes seconds.
"""

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from p2pswarm.client.portal import Portal
from p2pswarm.core.span import Span
from p2pswarm.net.private.invitation import Invitation
from p2pswarm.net.private.swarm_key import SwarmKey
from p2pswarm.testing.tiny_checkpoints import save_tiny_checkpoint, save_tiny_tokenizer
from swarm_cli.local_swarm import LocalSwarmPlan, local_swarm

TIMEOUT_S = 120.0
"""For a command. Far above what one takes alone on a machine: tests share theirs."""


def run_swarm(*arguments: str, home: Path, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    """A command that has ended; what it keeps for the next one is in `home`."""
    return subprocess.run(
        _words(*arguments),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
        env=_environment(home),
        **({"input": stdin} if stdin is not None else {"stdin": subprocess.DEVNULL}),
    )


def start_swarm(*arguments: str, home: Path) -> subprocess.Popen[str]:
    """A command that runs, to be read and told to stop."""
    return subprocess.Popen(
        _words(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=_environment(home)
    )


def _words(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "swarm_cli", *arguments]


def _environment(home: Path) -> Mapping[str, str]:
    """With one thread of torch, as the servers have."""
    ours = {
        "XDG_CACHE_HOME": str(home),
        "XDG_DATA_HOME": str(home),
        "PYTHONWARNINGS": "error::ResourceWarning",
        "OMP_NUM_THREADS": "1",
    }
    return os.environ | ours


@dataclass(frozen=True, slots=True)
class TinyServers:
    """Servers of one model that are ready."""

    model: str
    """Its folder."""
    peers: tuple[str, ...]
    """Addresses to join by, or an invitation."""
    home: Path
    """Where commands keep what they know."""

    key_path: Path | None = None
    """Of a private swarm; None: an open one."""

    @property
    def key_flags(self) -> list[str]:
        """For commands that are given no peers."""
        return [] if self.key_path is None else ["--swarm-key", str(self.key_path)]

    def run(self, *arguments: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
        """A command that knows these servers."""
        return run_swarm(*arguments, "--peers", *self.peers, home=self.home, stdin=stdin)

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """The same, running."""
        return start_swarm(*arguments, "--peers", *self.peers, home=self.home)


@pytest.fixture(scope="session")
def tiny_servers(tmp_path_factory: pytest.TempPathFactory, swarm_key_path: Path | None) -> Iterator[TinyServers]:
    """Of `tiny-llama`: `local-0-3` and `local-3-8`."""
    home = tmp_path_factory.mktemp("home")
    folder = save_tiny_checkpoint(home / "tiny-llama", "llama", eos_token_id=None)
    save_tiny_tokenizer(folder)
    with Portal() as portal:
        plan = LocalSwarmPlan(str(folder), (Span(0, 3), Span(3, 8)), threads=1, swarm_key=swarm_key_path)
        servers = portal.enter(local_swarm(plan)).value
        yield TinyServers(str(folder), invited_to(servers[0].addresses, swarm_key_path), home, swarm_key_path)


def invited_to(addresses: tuple[str, ...], swarm_key_path: Path | None) -> tuple[str, ...]:
    """What clients are given as peers: an invitation where the swarm is a private one."""
    if swarm_key_path is None:
        return addresses
    return (str(Invitation(SwarmKey.load(swarm_key_path), addresses)),)
