"""What happens to a node, told as it happens: to people in short lines, to programs (`--json`) as one JSON object a
line.

The events and their fields are listed in `docs/reference-swarmd.md`; what is not an event of the node's life is
logging.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TextIO

from p2pswarm.core.byte_sizes import format_byte_size
from p2pswarm.core.clock import Clock
from p2pswarm.core.reachability import Reachability
from swarmd.throughput import MEASURED_ROWS


class Events(Protocol):
    """Takes note of an event; never raises, never waits."""

    def __call__(self, event: str, **fields: object) -> None: ...


class JsonEvents:
    """Each event as `{"event": ..., "unix_time_s": ..., <fields>}` on a line of its own."""

    def __init__(self, stream: TextIO, clock: Clock) -> None:
        self._lines = Lines(stream)
        self._clock = clock

    def __call__(self, event: str, **fields: object) -> None:
        self._lines.write(json.dumps({"event": event, "unix_time_s": round(self._clock.unix_time_s(), 3)} | fields))


class PlainEvents:
    """Each event that an operator cares about as a sentence; the others are left out."""

    def __init__(self, stream: TextIO) -> None:
        self._lines = Lines(stream)

    def __call__(self, event: str, **fields: object) -> None:
        sentence = SENTENCES.get(event)
        if sentence is not None:
            self._lines.write(sentence(fields))


class Lines:
    """Writes lines at once, and stops writing, without a word, when the reader has gone: a server outlives its
    terminal.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream: TextIO | None = stream

    def write(self, line: str) -> None:
        if self._stream is None:
            return
        try:
            self._stream.write(line + "\n")
            self._stream.flush()
        except (OSError, ValueError):  # the pipe is broken, or the stream was closed
            self._stream = None


def _ready(fields: Mapping[str, Any]) -> str:
    if "blocks" not in fields:  # a node without a model
        return f"helping others to find each other; they join with: --peers {fields['addresses'][0]}"
    if "model" not in fields:
        return "\n".join([f"helping nodes to find each other, as {fields['peer_id']}, at", *fields["addresses"]])
    what = f"serving blocks {fields['blocks']} of {fields['num_model_blocks']} of {fields['model']}"
    weights = "" if fields["quantization"] == "none" else f"{fields['quantization']} weights, "
    how = f"{weights}{fields['dtype']} on {fields['device']}, {fields['start_s']:.1f} s after start"
    known = "as measured before" if fields["is_line_known"] else "assumed: nobody to measure against yet"
    line = f"a line of {fields['line_bits_per_s'] / 1e6:.3g} Mbit/s ({known})"
    adapters = [f"with the adapters {', '.join(fields['adapters'])}"] if fields["adapters"] else []
    return "\n  ".join(
        [
            what,
            *adapters,
            f"as {fields['peer_id']} ({how})",
            f"announced with {fields['throughput_tokens_per_s']:.4g} tokens/s, over {line}",
            f"others join with: {fields['join_command']}",
        ]
    )


def _sized(fields: Mapping[str, Any]) -> str:
    free, spare, block, kv, working = (
        format_byte_size(fields[f"{name}_bytes"]) for name in ("free", "spare", "block", "kv", "working")
    )
    return (
        f"{fields['num_blocks']} of {fields['num_model_blocks']} blocks: {free} free, {spare} of it left to others, "
        f"{block} a block, {kv} kept for the KV cache, {working} to work in"
    )


def _measured(fields: Mapping[str, Any]) -> str:
    threads = "1 thread" if fields["threads"] == 1 else f"{fields['threads']} threads"
    where = f"{fields['dtype']}, quantization {fields['quantization']}, {threads}, {fields['device']}"
    rows = [
        ("decode, 1 session", fields["decode_s"], 1),
        (f"decode, {MEASURED_ROWS} sessions", fields["batched_decode_s"], MEASURED_ROWS),
        ("a prompt, by token", fields["prefill_token_s"], 1),
    ]
    table = [f"  {what:20} {1e3 * took_s:9.2f} ms {tokens / took_s:10.1f} tokens/s" for what, took_s, tokens in rows]
    return "\n".join(
        [
            f"blocks {fields['blocks']} of {fields['model']} ({where}):",
            *table,
            f"  would be announced   {fields['throughput_tokens_per_s']:23.1f} tokens/s, over a line of "
            f"{fields['line_bits_per_s'] / 1e6:g} Mbit/s (assumed)",
            f"  room for {fields['cache_tokens']} tokens of KV cache",
        ]
    )


def _weights(fields: Mapping[str, Any]) -> str:
    if fields["work"] == "waiting":
        return f"waiting for another process, which is at the same weights: {fields['what']}"
    share = fields["done_bytes"] / max(fields["total_bytes"], 1)
    return f"{fields['work']} {fields['what']}: {share:.0%} of {format_byte_size(fields['total_bytes'])}"


def _reachability(fields: Mapping[str, Any]) -> str:
    if fields["state"] == Reachability.PUBLIC.value:
        return f"others can dial this node ({fields['why']})"
    return f"others cannot dial this node ({fields['why']}): looking for nodes that relay for it"


def _swarm_lost(fields: Mapping[str, Any]) -> str:
    return "no other node of the swarm answers any more: asking again until one does"


def _statistics(fields: Mapping[str, Any]) -> str:
    rates, errors = fields["tokens_per_s"], sum(fields["errors"].values())
    parts = [
        f"{fields['num_sessions']} sessions of {fields['num_peers']} peers",
        f"{rates['decode']:.1f} tokens/s decoded, {rates['prefill']:.1f} of prompts, {rates['forward']:.1f} forward",
        f"{format_byte_size(fields['received_bytes'])} in, {format_byte_size(fields['sent_bytes'])} out",
        f"{errors} errors, {fields['num_moves']} moves",
    ]
    if "num_waiting" in fields:
        parts.insert(1, f"{fields['num_waiting']} requests waiting, {fields['mean_batch_rows']:.1f} rows a batch")
        parts.insert(2, f"{fields['cache_tokens_used']} of {fields['cache_tokens_total']} KV tokens used")
    return "; ".join(parts)


SENTENCES: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "warning": lambda fields: f"warning: {fields['message']}",
    "joined": lambda fields: f"joined the swarm: {fields['num_peers']} nodes known",
    "join_failed": lambda fields: f"none of the given peers answers yet: {fields['message']}",
    "reachability": _reachability,
    "relay_reserved": lambda fields: f"reached through relay {fields['relay']}",
    "relay_lost": lambda fields: f"no longer reached through relay {fields['relay']}: {fields['message']}",
    "sized": _sized,
    "measured": _measured,
    "loading": lambda fields: f"loading {fields['model']}: blocks {fields['blocks']}, {fields['dtype']}",
    "weights": _weights,
    "ready": _ready,
    "line_measured": lambda fields: (
        f"the line carries {fields['bits_per_s'] / 1e6:.3g} Mbit/s, measured against {fields['num_peers']} servers"
    ),
    "swarm_lost": _swarm_lost,
    "swarm_found": lambda fields: f"back in the swarm: {fields['num_peers']} nodes known",
    "not_listed": lambda fields: "others do not find this server: announcing it again",
    "moving": lambda fields: (
        f"the swarm needs blocks {fields['to_blocks']} more than {fields['from_blocks']}: moving there; "
        f"{fields['num_sessions']} sessions may take {fields['grace_period_s']:g} s to end"
    ),
    "moved": lambda fields: (
        f"serving blocks {fields['to_blocks']} instead of {fields['from_blocks']}, after {fields['took_s']:.1f} s"
    ),
    "move_failed": lambda fields: (
        f"blocks {fields['to_blocks']} could not be served ({fields['message']}): "
        f"going back to blocks {fields['from_blocks']}"
    ),
    "metrics": lambda fields: f"statistics for Prometheus at {fields['url']}",
    "statistics": _statistics,
    "draining": lambda fields: (
        f"stopping: {fields['num_sessions']} sessions may take {fields['grace_period_s']:g} s to end"
    ),
    "stopped": lambda fields: "stopped",
    "error": lambda fields: f"error: {fields['message']}",
}
