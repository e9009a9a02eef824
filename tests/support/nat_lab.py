"""Homes behind routers, on one machine: network namespaces with masquerading routers between them.

    with nat_lab() as lab:
        relay = lab.public("relay")
        server = lab.behind(lab.router("home", Unsolicited.DROPPED), "server")
        process = server.start("swarmd", "start", ...)

Every place is a network namespace of its own; all that is public is on one wire, the internet (198.51.100.0/24).
Nothing leaves the machine and nothing of its own network is touched. It takes root, iproute2 and iptables.
"""

import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum

INTERNET = "198.51.100"
"""The first three numbers of public addresses (RFC 5737)."""
COMMAND_TIMEOUT_S = 20.0


class Unsolicited(Enum):
    """What a router, or a firewall, does with a connection from outside that nobody inside has asked for."""

    DROPPED = "dropped"
    """It says nothing. The port of a connection from inside stays what it was (a full-cone-like home router)."""
    REFUSED = "refused"
    """It answers with a reset, and gives each connection from inside a port by chance (a symmetric-like NAT)."""


def missing_for_lab() -> str | None:
    """Why namespaces cannot be made here; None where they can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "network namespaces take root on Linux"
    missing = [tool for tool in ("ip", "iptables", "sysctl") if shutil.which(tool) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (apt-get install iproute2 iptables procps)"
    name = f"nat{os.getpid()}probe"
    made = _run("ip", "netns", "add", name, check=False)
    if made.returncode:
        return f"no network namespaces here: {made.stderr.strip()}"
    try:
        rule = _run("ip", "netns", "exec", name, "iptables", "-t", "nat", "-L", check=False)
        return f"no NAT here: {rule.stderr.strip()}" if rule.returncode else None
    finally:
        _run("ip", "netns", "del", name)


def _run(*command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False)
    if check and done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done


@dataclass(frozen=True)
class Place:
    """A machine somewhere, by its namespace."""

    namespace: str
    address: str
    """As it knows itself."""

    def command(self, *command: str) -> list[str]:
        """The command as it must be called so that it runs here."""
        return ["ip", "netns", "exec", self.namespace, *command]

    def run(self, *command: str) -> str:
        """Runs to its end; what it printed. Raises `RuntimeError`."""
        return _run(*self.command(*command)).stdout

    def filter(self, *rule: str) -> None:
        """One more rule of this machine's firewall."""
        self.run("iptables", "-A", *rule)


class NatLab:
    """Made by `nat_lab`, which takes it down again."""

    def __init__(self) -> None:
        self._prefix = f"nat{os.getpid()}-"
        self._namespaces: list[str] = []
        self._numbers = itertools.count(10)
        self._internet = self._namespace("internet")
        self._ip(self._internet, "link", "add", "wire", "type", "bridge")
        self._ip(self._internet, "link", "set", "wire", "up")

    def public(self, name: str, *, firewall: Unsolicited | None = None) -> Place:
        """A machine with a public address; with a `firewall` it can only call, not be called."""
        number = next(self._numbers)
        place = Place(self._namespace(name), f"{INTERNET}.{number}")
        self._plug_in(place.namespace, f"{place.address}/24", self._internet, "wire", number)
        if firewall is not None:
            _keep_out(place, "INPUT", firewall)
        return place

    def router(self, name: str, unsolicited: Unsolicited, *, behind: Place | None = None) -> Place:
        """A router with a network of its own; its outer side is on the internet, or `behind` another router."""
        router = self.public(name) if behind is None else self.behind(behind, name)
        scatter = ["--random-fully"] if unsolicited is Unsolicited.REFUSED else []
        router.run("sysctl", "-qw", "net.ipv4.ip_forward=1")
        router.run("iptables", "-t", "nat", "-A", "POSTROUTING", "-o", "outer", "-j", "MASQUERADE", *scatter)
        for chain in ("INPUT", "FORWARD"):
            _keep_out(router, chain, unsolicited)
        number = next(self._numbers)
        self._ip(router.namespace, "link", "add", "inner", "type", "bridge")
        self._ip(router.namespace, "addr", "add", f"10.0.{number}.1/24", "dev", "inner")
        self._ip(router.namespace, "link", "set", "inner", "up")
        return Place(router.namespace, f"10.0.{number}.1")

    def behind(self, router: Place, name: str) -> Place:
        """A machine in the router's network."""
        number = next(self._numbers)
        network = router.address.rpartition(".")[0]
        place = Place(self._namespace(name), f"{network}.{number}")
        self._plug_in(place.namespace, f"{place.address}/24", router.namespace, "inner", number)
        self._ip(place.namespace, "route", "add", "default", "via", router.address)
        return place

    def take_down(self) -> None:
        for namespace in reversed(self._namespaces):
            for process_id in _run("ip", "netns", "pids", namespace, check=False).stdout.split():
                _run("kill", "-9", process_id, check=False)
            _run("ip", "netns", "del", namespace, check=False)

    def _namespace(self, name: str) -> str:
        namespace = self._prefix + name
        _run("ip", "netns", "add", namespace)
        self._namespaces.append(namespace)
        self._ip(namespace, "link", "set", "lo", "up")
        return namespace

    def _plug_in(self, namespace: str, address: str, other: str, bridge: str, number: int) -> None:
        """A cable from the namespace's device `outer` to a bridge in the other namespace."""
        self._ip(namespace, "link", "add", "outer", "type", "veth", "peer", "name", f"port{number}", "netns", other)
        self._ip(other, "link", "set", f"port{number}", "master", bridge, "up")
        self._ip(namespace, "addr", "add", address, "dev", "outer")
        self._ip(namespace, "link", "set", "outer", "up")

    @staticmethod
    def _ip(namespace: str, *arguments: str) -> None:
        _run("ip", "-n", namespace, *arguments)


def _keep_out(place: Place, chain: str, unsolicited: Unsolicited) -> None:
    verdict: Sequence[str] = ["DROP"]
    if unsolicited is Unsolicited.REFUSED:
        verdict = ["REJECT", "--reject-with", "tcp-reset"]
    place.filter(chain, "-i", "outer", "-p", "tcp", "-m", "conntrack", "--ctstate", "NEW", "-j", *verdict)


@contextmanager
def nat_lab() -> Iterator[NatLab]:
    """An empty lab; with it go all its namespaces and all processes in them."""
    lab = NatLab()
    try:
        yield lab
    finally:
        lab.take_down()
