"""`docs/protocol.md` says what the code does."""

import json
import re
from pathlib import Path

import pytest
import torch

from p2pswarm.rpc.limits import DEFAULT_RPC_LIMITS, RPC_PROTOCOL
from p2pswarm.rpc.speed_tests import LONG_ENOUGH_S, SIZES_BYTES
from p2pswarm.wire.codecs import encode_tensor
from p2pswarm.wire.framed_stream import SLOWEST_BYTES_PER_S
from p2pswarm.wire.frames import DEFAULT_LIMITS, FrameDecoder
from p2pswarm.wire.messages import MAX_SPEED_TEST_BYTES, PROTOCOL_VERSION, TUNING_VERSION, ErrorCode, Step
from p2pswarm.wire.serialization import MAX_PEERS_TOLD, encode_message, message_types
from p2pswarm.wire.tensors import INT8_BLOCK, ITEM_BYTES, Codec
from p2pswarm.wire.tuning import MAX_PATH_CHARACTERS, MAX_TUNED_LAYERS, MAX_TUNED_SIZE

PAGE = (Path(__file__).parents[2] / "docs" / "protocol.md").read_text()


def section(title: str) -> str:
    return re.split(r"^## ", PAGE.partition(f"## {title}\n")[2], flags=re.MULTILINE)[0]


def first_cells(text: str) -> list[str]:
    """The names in the first column of the section's tables."""
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    return [name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])]


def test_the_example_is_what_is_sent() -> None:
    step = b"".join(encode_message(Step(7, 5, encode_tensor(torch.zeros(1, 1, 576)))))
    decoder = FrameDecoder()
    decoder.feed(step)
    frame = decoder.next_frame()
    assert frame is not None
    (example,) = re.findall(r"```json\n(.*?)```", PAGE, flags=re.DOTALL)
    assert frame.header == json.loads(example)
    assert f"is {len(step) - 2304} bytes of lengths and header and 2304 of hidden states" in PAGE


def test_all_messages_are_listed() -> None:
    listed = set(first_cells(section("Messages"))) - {"type", "version", "tensors"}
    assert listed == set(message_types())


def test_all_error_codes_are_listed() -> None:
    assert set(first_cells(section("Errors"))) == {code.value for code in ErrorCode}


def test_all_codecs_and_dtypes_are_listed() -> None:
    text = section("Tensors and codecs")
    assert set(first_cells(text)) == {codec.value for codec in Codec}
    assert f"`{' '.join(ITEM_BYTES)}`" in text
    assert f"blocks of {INT8_BLOCK}" in text


@pytest.mark.parametrize(
    "statement",
    [
        f"| a message under way | {SLOWEST_BYTES_PER_S >> 10} KiB/s:",
        f"| frame | {DEFAULT_LIMITS.max_frame_bytes >> 20} MiB |",
        f"| header | {DEFAULT_LIMITS.max_header_bytes >> 10} KiB, not empty |",
        f"| tensors in a frame | {DEFAULT_LIMITS.max_tensors} |",
        f"| one tensor, as it travels and decoded | {DEFAULT_LIMITS.max_tensor_bytes >> 20} MiB |",
        f"| dimensions | {DEFAULT_LIMITS.max_dimensions}, each",
        f"more than {DEFAULT_LIMITS.max_items} entries",
        f"sizes are 1 to 2^{MAX_TUNED_SIZE.bit_length() - 1}; there are at most {MAX_TUNED_LAYERS} layers.",
        f"at most {MAX_PATH_CHARACTERS} letters, digits and underscores",
        f"- Version {TUNING_VERSION} added `backward`, `backward_reply` and `tuning`.",
        f"`{RPC_PROTOCOL}`",
        f"in the headers, now {PROTOCOL_VERSION}.",
        f"at most {MAX_PEERS_TOLD})",
        f"| streams | {DEFAULT_RPC_LIMITS.max_streams}, of one peer {DEFAULT_RPC_LIMITS.max_streams_per_peer} |",
        f"| sessions of one peer | {DEFAULT_RPC_LIMITS.max_sessions_per_peer},",
        f"in work | {DEFAULT_RPC_LIMITS.max_received_bytes >> 30} GiB, "
        f"of one peer {DEFAULT_RPC_LIMITS.max_received_bytes_per_peer >> 20} MiB |",
        f"| speed tests | {DEFAULT_RPC_LIMITS.max_speed_test_bytes >> 20} MiB a minute, "
        f"of one peer {DEFAULT_RPC_LIMITS.max_speed_test_bytes_per_peer >> 20} MiB,",
        f"{SIZES_BYTES[0] >> 10} KiB, {SIZES_BYTES[1] >> 10} KiB and {SIZES_BYTES[2] >> 20} MiB each way",
        f"of at most {MAX_SPEED_TEST_BYTES >> 20} MiB each way.",
        f"took less than {LONG_ENOUGH_S:g} s",
        f"| within {DEFAULT_RPC_LIMITS.first_message_timeout_s:g} s |",
        f"| next call on a stream | within {DEFAULT_RPC_LIMITS.idle_stream_timeout_s:g} s |",
        f"| first step of a session | within {DEFAULT_RPC_LIMITS.first_step_timeout_s:g} s |",
        f"| next step of a session | within {DEFAULT_RPC_LIMITS.idle_session_timeout_s:g} s |",
        f"| answered within {DEFAULT_RPC_LIMITS.call_timeout_s:g} s |",
        f"| a push | waits {DEFAULT_RPC_LIMITS.push_wait_s:g} s for its step |",
        f"| taken by the client within {DEFAULT_RPC_LIMITS.send_timeout_s:g} s |",
        f"(ours: {DEFAULT_RPC_LIMITS.max_idle_streams_per_peer} a peer, "
        f"for {DEFAULT_RPC_LIMITS.keep_idle_stream_s:g} s)",
    ],
)
def test_numbers_are_the_codes(statement: str) -> None:
    assert statement in re.sub(r"\s+", " ", PAGE)
