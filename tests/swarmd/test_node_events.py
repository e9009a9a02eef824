"""Events reach programs as JSON lines and people as sentences, and never harm the node."""

import io
import json

from swarmd.events import JsonEvents, PlainEvents


class StoppedClock:
    def unix_time_s(self) -> float:
        return 1700000000.1234


class BrokenPipe(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError


READY = {
    "peer_id": "12D3KooWabc",
    "model": "tiny",
    "blocks": "0:4",
    "num_model_blocks": 8,
    "dtype": "float32",
    "device": "cpu",
    "start_s": 1.234,
    "join_command": "swarmd start tiny --peers /ip4/192.0.2.7/tcp/4001/p2p/12D3KooWabc",
}


def test_json_events_are_one_object_a_line() -> None:
    stream = io.StringIO()
    events = JsonEvents(stream, StoppedClock())
    events("starting", model="tiny")
    events("ready", **READY)
    first, second = (json.loads(line) for line in stream.getvalue().splitlines())
    assert first == {"event": "starting", "unix_time_s": 1700000000.123, "model": "tiny"}
    assert second["blocks"] == "0:4"


def test_people_read_what_is_served_and_how_to_join() -> None:
    stream = io.StringIO()
    events = PlainEvents(stream)
    events("starting", model="tiny")
    events("ready", **READY)
    assert stream.getvalue() == (
        "serving blocks 0:4 of 8 of tiny\n"
        "  as 12D3KooWabc (float32 on cpu, 1.2 s after start)\n"
        "  others join with: swarmd start tiny --peers /ip4/192.0.2.7/tcp/4001/p2p/12D3KooWabc\n"
    )


def test_a_node_without_a_model_says_how_to_join() -> None:
    stream = io.StringIO()
    PlainEvents(stream)("ready", peer_id="12D3KooWabc", addresses=["/ip4/192.0.2.7/tcp/4001/p2p/12D3KooWabc"])
    assert stream.getvalue() == (
        "helping others to find each other; they join with: --peers /ip4/192.0.2.7/tcp/4001/p2p/12D3KooWabc\n"
    )


def test_a_reader_who_has_gone_does_no_harm() -> None:
    events = JsonEvents(BrokenPipe(), StoppedClock())
    events("starting")
    events("stopped")
