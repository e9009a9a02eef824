"""Servers and clients behind routers: whom others can dial, who needs a relay, and text that is the same all along."""

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from queue import Empty, Queue
from typing import Any

import nat_client
import pytest
import torch
from nat_lab import NatLab, Place, Unsolicited, missing_for_lab, nat_lab

from p2pswarm.checkpoint.checkpoint import open_checkpoint
from p2pswarm.checkpoint.local_model import load_local_model
from swarm_cli.sample_model import sample_model

MISSING = missing_for_lab()

pytestmark = [
    pytest.mark.real,
    pytest.mark.slow,
    pytest.mark.alone,
    pytest.mark.skipif(MISSING is not None, reason=str(MISSING)),
]

PROMPT = "Once upon a time, in a village by the sea,"
NUM_TOKENS = 224
"""A quarter of a minute of text: holes are punched again some seconds after a first try."""
START_TO_SERVING_S = 20.0
"""What an operator waits, at most, until a client behind another router has an answer."""
ANSWER_TIMEOUT_S = 60.0
EVENT_TIMEOUT_S = 60.0
"""Ten programs that start at once on two cores take a while to say anything."""


class Program:
    """A process in some place that tells JSON lines."""

    def __init__(self, place: Place, *command: str, folder: Path) -> None:
        self.started_s = time.monotonic()
        self._errors = (folder / f"{place.namespace}.log").open("ab")
        self.process = subprocess.Popen(
            place.command(sys.executable, *command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        self._lines: Queue[dict[str, Any]] = Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(json.loads(line) | {"told_s": time.monotonic()})

    def tells(self, wanted: Callable[[dict[str, Any]], bool], within_s: float) -> dict[str, Any]:
        """The next line that is wanted."""
        deadline_s = time.monotonic() + within_s
        seen = []
        while (left_s := deadline_s - time.monotonic()) > 0:
            try:
                line = self._lines.get(timeout=left_s)
            except Empty:
                break
            if wanted(line):
                return line
            seen.append(line)
        raise AssertionError(f"not told within {within_s} s; told was {seen}")

    def event(self, name: str, within_s: float = EVENT_TIMEOUT_S, **values: object) -> dict[str, Any]:
        def is_wanted(line: dict[str, Any]) -> bool:
            return line.get("event") == name and values.items() <= line.items()

        return self.tells(is_wanted, within_s)

    def rest(self) -> list[dict[str, Any]]:
        """All that it tells until it ends, which it does by itself."""
        assert self.process.wait(ANSWER_TIMEOUT_S) == 0
        lines = []
        while not self._lines.empty():
            lines.append(self._lines.get())
        return lines

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._reader.join()
        assert self.process.stdout is not None
        self.process.stdout.close()
        self._errors.close()


class World:
    """A lab with programs in it."""

    def __init__(self, lab: NatLab, folder: Path, stack: ExitStack) -> None:
        self.lab = lab
        self._folder = folder
        self._stack = stack

    def start(self, place: Place, *command: str) -> Program:
        program = Program(place, *command, folder=self._folder)
        self._stack.callback(program.end)
        return program

    def bootstrap(self, place: Place, *flags: str) -> Program:
        key = self._folder / f"{place.namespace}.key"
        return self.start(place, "-m", "swarmd", "bootstrap", "--json", "--identity", str(key), *flags)

    def relays(self, count: int = 2) -> tuple[list[Program], list[str]]:
        """Public nodes that help others, and the addresses to join them by."""
        programs: list[Program] = []
        peers: list[str] = []
        for number in range(count):
            place = self.lab.public(f"relay{number}")
            joining = ["--peers", *peers] if peers else []
            programs.append(self.bootstrap(place, *joining))
            addresses = programs[-1].event("ready")["addresses"]
            peers.append(next(address for address in addresses if place.address in address))
        return programs, peers

    def server(self, place: Place, peers: list[str]) -> Program:
        """A server that is started as anybody would."""
        key = self._folder / f"{place.namespace}.key"
        options = ("--threads", "1", "--dtype", "float32", "--identity", str(key))
        return self.start(place, "-m", "swarmd", "start", sample_model(), "--json", *options, "--peers", *peers)

    def client(self, place: Place, peers: list[str]) -> Program:
        return self.start(place, nat_client.__file__, sample_model(), str(NUM_TOKENS), PROMPT, *peers)


@contextmanager
def open_world(folder: Path) -> Iterator[World]:
    with nat_lab() as lab, ExitStack() as stack:
        yield World(lab, folder, stack)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with open_world(tmp_path) as world:
        yield world


@pytest.fixture(scope="module")
def expected() -> list[int]:
    """What the local model answers."""
    threads_before = torch.get_num_threads()
    torch.set_num_threads(1)
    checkpoint = open_checkpoint(sample_model())
    prompt = checkpoint.tokenizer()(PROMPT, return_tensors="pt")["input_ids"]
    options = {"do_sample": False, "min_new_tokens": NUM_TOKENS, "max_new_tokens": NUM_TOKENS}
    token_ids = load_local_model(checkpoint).generate(prompt, **options)[0, prompt.shape[1] :].tolist()
    torch.set_num_threads(threads_before)
    return token_ids


def tokens(lines: list[dict[str, Any]]) -> list[int]:
    return [line["token"] for line in lines if "token" in line]


def relays_used(lines: list[dict[str, Any]]) -> list[str | None]:
    """Per token, how the only server was reached."""
    return [line["relays"][0] for line in lines if "token" in line]


def peer_id(address: str) -> str:
    return address.rpartition("/")[2]


def outer_address(router: Place) -> str:
    """Of the router on the internet."""
    return router.run("ip", "-4", "-o", "addr", "show", "dev", "outer").split()[3].partition("/")[0]


def test_each_node_knows_whether_others_can_dial_it(world: World) -> None:
    _, peers = world.relays()
    lab = world.lab
    home = lab.router("home", Unsolicited.DROPPED)
    nodes = {
        "public": (lab.public("public"), "public"),
        "behind a router that drops": (lab.behind(home, "dropped"), "private"),
        "behind a router that refuses": (lab.behind(lab.router("office", Unsolicited.REFUSED), "refused"), "private"),
        "behind two routers": (lab.behind(lab.router("inner", Unsolicited.DROPPED, behind=home), "double"), "private"),
        "public address, firewalled": (lab.public("walled", firewall=Unsolicited.DROPPED), "private"),
        "public address, refused": (lab.public("closed", firewall=Unsolicited.REFUSED), "private"),
    }
    programs = {name: world.bootstrap(place, "--peers", *peers) for name, (place, _) in nodes.items()}
    found = {name: program.event("reachability")["state"] for name, program in programs.items()}
    assert found == {name: state for name, (_, state) in nodes.items()}


def test_a_relayed_text_goes_on_directly_where_the_routers_allow_it(world: World, expected: list[int]) -> None:
    _, peers = world.relays()
    home, cafe = (world.lab.router(name, Unsolicited.DROPPED) for name in ("home", "cafe"))
    no_direct_way = ("FORWARD", "-d", outer_address(home), "-j", "DROP")
    cafe.run("iptables", "-I", *no_direct_way)
    server = world.server(world.lab.behind(home, "server"), peers)
    model_id = server.event("ready")["model_id"]
    elsewhere = world.lab.behind(cafe, "client")
    client = world.client(elsewhere, peers)
    lines = [client.tells(lambda line: "token" in line, ANSWER_TIMEOUT_S)]
    assert lines[0]["told_s"] - server.started_s < START_TO_SERVING_S
    cafe.run("iptables", "-D", *no_direct_way)
    lines += client.rest()
    assert tokens(lines) == expected
    assert relays_used(lines)[0] in {peer_id(address) for address in peers}
    assert relays_used(lines)[-1] is None
    assert lines[-1]["num_recoveries"] == 0
    command = ("-m", "swarm_cli", "route", model_id, "--json", "--peers", *peers)
    route = json.loads(elsewhere.run(sys.executable, *command))
    [path] = route["paths"]
    assert path["relay"] in {peer_id(address) for address in peers}
    assert path["direct_after_s"] is not None


def test_a_text_outlives_its_relay_where_the_routers_allow_nothing_else(world: World, expected: list[int]) -> None:
    relays, peers = world.relays(3)
    world.server(world.lab.behind(world.lab.router("home", Unsolicited.REFUSED), "server"), peers).event("ready")
    client = world.client(world.lab.behind(world.lab.router("office", Unsolicited.REFUSED), "client"), peers)
    lines = [client.tells(lambda line: "token" in line, ANSWER_TIMEOUT_S) for _ in range(NUM_TOKENS // 3)]
    [used] = set(relays_used(lines))
    relays[[peer_id(address) for address in peers].index(str(used))].kill()
    killed_s = time.monotonic()
    lines.append(client.tells(lambda line: "token" in line and line["relays"] != [used], ANSWER_TIMEOUT_S))
    assert lines[-1]["told_s"] - killed_s < 5.0
    lines += client.rest()
    assert tokens(lines) == expected
    assert used not in relays_used(lines)[NUM_TOKENS // 2 :]
    assert None not in relays_used(lines)
