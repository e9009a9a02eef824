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
    "quantization": "none",
    "adapters": [],
    "device": "cpu",
    "throughput_tokens_per_s": 1163.636,
    "line_bits_per_s": 100000000,
    "is_line_known": False,
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
        "  announced with 1164 tokens/s, over a line of 100 Mbit/s (assumed: nobody to measure against yet)\n"
        "  others join with: swarmd start tiny --peers /ip4/192.0.2.7/tcp/4001/p2p/12D3KooWabc\n"
    )


def test_people_read_which_adapters_are_served() -> None:
    stream = io.StringIO()
    PlainEvents(stream)("ready", **READY | {"adapters": ["poet@01", "clerk@02"]})
    assert stream.getvalue().splitlines()[1] == "  with the adapters poet@01, clerk@02"


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


def test_an_operator_reads_how_the_number_of_blocks_was_chosen() -> None:
    stream = io.StringIO()
    mib = 1 << 20
    PlainEvents(stream)(
        "sized",
        num_blocks=12,
        num_model_blocks=30,
        free_bytes=3174 * mib,
        spare_bytes=635 * mib,
        block_bytes=200 * mib,
        kv_bytes=96 * mib,
        working_bytes=40 * mib,
    )
    assert stream.getvalue() == (
        "12 of 30 blocks: 3.1 GiB free, 635 MiB of it left to others, 200 MiB a block, 96 MiB kept for the KV cache, "
        "40 MiB to work in\n"
    )


def test_a_dry_run_shows_a_table() -> None:
    stream = io.StringIO()
    PlainEvents(stream)(
        "measured",
        model="tiny",
        blocks="0:10",
        num_blocks=10,
        dtype="float32",
        quantization="none",
        device="cpu of some make",
        threads=1,
        cache_tokens=131072,
        line_bits_per_s=100e6,
        decode_s=0.01,
        batched_decode_s=0.016,
        prefill_token_s=0.0025,
        inference_tokens_per_s=1000.0,
        forward_tokens_per_s=4000.0,
        network_tokens_per_s=5425.3,
        throughput_tokens_per_s=727.27,
    )
    assert stream.getvalue() == (
        "blocks 0:10 of tiny (float32, quantization none, 1 thread, cpu of some make):\n"
        "  decode, 1 session        10.00 ms      100.0 tokens/s\n"
        "  decode, 8 sessions       16.00 ms      500.0 tokens/s\n"
        "  a prompt, by token        2.50 ms      400.0 tokens/s\n"
        "  would be announced                     727.3 tokens/s, over a line of 100 Mbit/s (assumed)\n"
        "  room for 131072 tokens of KV cache\n"
    )


def test_an_operator_reads_how_others_reach_the_node() -> None:
    stream = io.StringIO()
    events = PlainEvents(stream)
    events("reachability", state="private", why="0 of 3 peers got through", addresses=[])
    events("relay_reserved", relay="12D3relay", addresses=[])
    events("relay_lost", relay="12D3relay", message="the connection broke")
    events("reachability", state="public", why="2 of 2 peers got through", addresses=[])
    assert stream.getvalue().splitlines() == [
        "others cannot dial this node (0 of 3 peers got through): looking for nodes that relay for it",
        "reached through relay 12D3relay",
        "no longer reached through relay 12D3relay: the connection broke",
        "others can dial this node (2 of 2 peers got through)",
    ]
