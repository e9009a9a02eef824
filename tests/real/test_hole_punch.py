"""Two nodes behind real routers, one stream between them: it goes over from the relay to a direct connection."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import punch_node
import pytest
from nat_lab import NatLab, Place, Unsolicited, missing_for_lab, nat_lab

pytestmark = [
    pytest.mark.real,
    pytest.mark.slow,
    pytest.mark.skipif(missing_for_lab() is not None, reason=str(missing_for_lab())),
]

TALK_S = 5.0
PUNCHED_WITHIN_S = 3.0
BLOCKED_S = 2.0
RETRIED_WITHIN_S = 10.0
"""The second try begins 6 s after the first."""
DROPPED, REFUSED = Unsolicited.DROPPED, Unsolicited.REFUSED


def at_home(lab: NatLab, name: str, unsolicited: Unsolicited = DROPPED) -> Place:
    return lab.behind(lab.router(f"{name}router", unsolicited), name)


def behind_two_routers(lab: NatLab, name: str) -> Place:
    outer = lab.router(f"{name}outer", DROPPED)
    return lab.behind(lab.router(f"{name}inner", DROPPED, behind=outer), name)


def walled(lab: NatLab, name: str) -> Place:
    return lab.public(name, firewall=DROPPED)


@dataclass
class Lab:
    lab: NatLab
    stack: ExitStack

    def start(self, place: Place, *arguments: str) -> subprocess.Popen[str]:
        command = place.command(sys.executable, punch_node.__file__, *arguments)
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.stack.enter_context(process)
        self.stack.callback(process.kill)
        return process

    def talk(
        self, called_at: Place, caller_at: Place, seconds: float = TALK_S, begun: Callable[[], None] = lambda: None
    ) -> list[dict[str, Any]]:
        """All that the caller tells; `begun` is called when the two talk."""
        relay_at = self.lab.public("relay")
        relay = self.start(relay_at, "relay", relay_at.address)
        called = self.start(called_at, "called", line_of(relay)["addresses"][0])
        caller = self.start(caller_at, "caller", line_of(called)["addresses"][0], str(seconds))
        lines = [line_of(caller)]
        begun()
        assert caller.stdout is not None
        lines += map(json.loads, caller.stdout)
        assert caller.wait(10) == 0
        assert not lines[0]["is_direct"], "it began through the relay"
        return lines


def line_of(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    return json.loads(process.stdout.readline())


@pytest.fixture
def lab() -> Iterator[Lab]:
    with nat_lab() as lab, ExitStack() as stack:
        yield Lab(lab, stack)


@pytest.mark.parametrize(
    ("called_at", "caller_at"),
    [
        (at_home, at_home),
        (at_home, lambda lab, name: lab.public(name)),
        pytest.param(walled, at_home, marks=pytest.mark.exhaustive),
        pytest.param(walled, walled, marks=pytest.mark.exhaustive),
        (behind_two_routers, at_home),
    ],
    ids=["two homes", "home, public caller", "firewall, home", "two firewalls", "two routers, home"],
)
def test_open_stream_goes_over_to_a_direct_connection_where_routers_say_nothing_to_strangers(
    lab: Lab, called_at: Callable[[NatLab, str], Place], caller_at: Callable[[NatLab, str], Place]
) -> None:
    lines = lab.talk(called_at(lab.lab, "called"), caller_at(lab.lab, "caller"))
    assert lines[1]["is_direct"]
    assert lines[1]["after_s"] < PUNCHED_WITHIN_S
    assert all(line["is_direct"] for line in lines[1:-1]), "and stayed direct"


def test_relayed_stream_is_unharmed_where_routers_refuse_strangers(lab: Lab) -> None:
    lines = lab.talk(at_home(lab.lab, "called", REFUSED), at_home(lab.lab, "caller", REFUSED))
    assert [line["is_direct"] for line in lines[:-1]] == [False]
    assert lines[-1]["num_messages"] > 100


def test_hole_that_could_not_be_punched_at_first_is_tried_again(lab: Lab) -> None:
    called_router, caller_router = (lab.lab.router(name, DROPPED) for name in ("home", "cafe"))
    outer_address = called_router.run("ip", "-4", "-o", "addr", "show", "dev", "outer").split()[3]
    to_the_other = ["FORWARD", "-d", outer_address.partition("/")[0], "-j", "DROP"]
    caller_router.run("iptables", "-I", *to_the_other)

    def open_the_way() -> None:
        time.sleep(BLOCKED_S)
        caller_router.run("iptables", "-D", *to_the_other)

    called_at, caller_at = lab.lab.behind(called_router, "called"), lab.lab.behind(caller_router, "caller")
    lines = lab.talk(called_at, caller_at, RETRIED_WITHIN_S, open_the_way)
    assert [line["is_direct"] for line in lines[:-1]] == [False, True]
    assert BLOCKED_S < lines[1]["after_s"] < RETRIED_WITHIN_S
