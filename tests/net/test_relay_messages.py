"""Messages to and from relays: what is written is read, and nothing else gets through."""

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pswarm.core.errors import ConnectionLost, ProtocolViolation
from p2pswarm.core.ids import ProtocolId
from p2pswarm.net.identity import Identity
from p2pswarm.net.libp2p_parts import HopMessage, StopMessage
from p2pswarm.net.nat.protobuf_frames import MAX_MESSAGE_BYTES, frame, read_frame
from p2pswarm.net.nat.relay_messages import (
    REASONS,
    CircuitLimit,
    ConnectRequest,
    IncomingCircuit,
    RelayAnswer,
    RelayStatus,
    ReserveRequest,
    encode_hop,
    encode_stop,
    read_hop_answer,
    read_hop_request,
    read_stop_answer,
    read_stop_request,
)
from p2pswarm.net.network import Buffer

ALICE = Identity.generate(bytes(32)).peer_id
BOB = Identity.generate(bytes(range(32))).peer_id
READERS = (read_hop_request, read_hop_answer, read_stop_request, read_stop_answer)

limits = st.builds(
    CircuitLimit,
    duration_s=st.none() | st.integers(1, 2**32 - 1),
    data_bytes=st.none() | st.integers(1, 2**64 - 1),
)
addresses = st.sampled_from(
    (f"/ip4/192.0.2.1/tcp/4001/p2p/{ALICE}", f"/ip6/2001:db8::1/tcp/1/p2p/{ALICE}", "/dns4/relay.example.org/tcp/443")
)


class ReadOnlyStream:
    """A stream on which this much has come, before the peer closed its side."""

    def __init__(self, data: bytes, piece_bytes: int = 1 << 20) -> None:
        self.peer_id = BOB
        self.protocol = ProtocolId("/test")
        self._data = data
        self._piece_bytes = piece_bytes

    async def read(self, max_bytes: int = 1 << 20) -> bytes:
        num_bytes = min(max_bytes, self._piece_bytes)
        data, self._data = self._data[:num_bytes], self._data[num_bytes:]
        return data

    async def write(self, *buffers: Buffer) -> None:
        raise AssertionError("nothing is written here")

    async def close_write(self) -> None: ...

    def reset(self) -> None: ...


@settings(deadline=None)
@given(
    st.sampled_from([ReserveRequest(), ConnectRequest(ALICE)]),
    st.integers(1, 50),
)
async def test_requests_to_a_relay_are_read_as_written(request: ReserveRequest | ConnectRequest, piece: int) -> None:
    stream = ReadOnlyStream(encode_hop(request) + b"rest", piece)
    assert await read_hop_request(stream) == request
    assert await stream.read(1) == b"r"


@settings(deadline=None)
@given(
    st.builds(
        RelayAnswer,
        st.sampled_from(RelayStatus),
        limits,
        st.lists(addresses, max_size=8).map(tuple),
        st.integers(1, 2**63),
    )
)
async def test_answers_of_a_relay_are_read_as_written(answer: RelayAnswer) -> None:
    assert await read_hop_answer(ReadOnlyStream(encode_hop(answer))) == answer


@settings(deadline=None)
@given(limits, st.sampled_from(RelayStatus))
async def test_circuits_and_their_answers_are_read_as_written(limit: CircuitLimit, status: RelayStatus) -> None:
    circuit = IncomingCircuit(ALICE, limit)
    assert await read_stop_request(ReadOnlyStream(encode_stop(circuit))) == circuit
    assert await read_stop_answer(ReadOnlyStream(encode_stop(RelayAnswer(status)))) is status


async def test_a_stream_that_ends_instead_of_a_request_asks_for_nothing() -> None:
    assert await read_hop_request(ReadOnlyStream(b"")) is None
    with pytest.raises(ConnectionLost, match="instead of saying something"):
        await read_hop_answer(ReadOnlyStream(b""))


@pytest.mark.parametrize("data", [encode_hop(ConnectRequest(ALICE))[:-1], b"\x80", b"\x05abc"])
async def test_a_message_that_breaks_off_is_a_lost_connection(data: bytes) -> None:
    with pytest.raises(ConnectionLost, match="in the middle"):
        await read_hop_request(ReadOnlyStream(data))


@pytest.mark.parametrize("length", [b"\x81\x20", b"\xff\xff\x01", b"\x80\x80\x80\x80\x80\x01"])
async def test_messages_beyond_the_bound_are_refused_by_their_length(length: bytes) -> None:
    with pytest.raises(ProtocolViolation, match=str(MAX_MESSAGE_BYTES)):
        await read_hop_request(ReadOnlyStream(length + bytes(5000)))


@settings(deadline=None)
@given(st.binary(max_size=MAX_MESSAGE_BYTES))
async def test_frames_of_any_length_are_read_as_written(message: bytes) -> None:
    assert await read_frame(ReadOnlyStream(frame(message))) == message


@settings(deadline=None)
@given(st.binary(max_size=200))
async def test_arbitrary_bytes_are_a_message_or_a_violation(data: bytes) -> None:
    for read in READERS:
        with contextlib.suppress(ProtocolViolation):
            await read(ReadOnlyStream(frame(data)))


def hop(**fields: object) -> bytes:
    return frame(HopMessage(**fields).SerializeToString())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "data",
    [
        hop(type=HopMessage.CONNECT),
        hop(type=HopMessage.STATUS, status=100),
        hop(type=7),
        frame(b"\xff\xff\xff"),
    ],
)
async def test_requests_that_make_no_sense_are_violations(data: bytes) -> None:
    with pytest.raises(ProtocolViolation, match=BOB):
        await read_hop_request(ReadOnlyStream(data))


async def test_answers_with_unknown_numbers_or_broken_addresses_are_violations() -> None:
    with pytest.raises(ProtocolViolation, match="answered 999, wanted one of 100"):
        await read_hop_answer(ReadOnlyStream(hop(type=HopMessage.STATUS, status=999)))
    broken = HopMessage(type=HopMessage.STATUS, status=100)  # type: ignore[arg-type]
    broken.reservation.addrs.append(b"\xff")
    with pytest.raises(ProtocolViolation, match="not a multiaddr"):
        await read_hop_answer(ReadOnlyStream(frame(broken.SerializeToString())))
    with pytest.raises(ProtocolViolation, match="a circuit where an answer was due"):
        await read_stop_answer(ReadOnlyStream(encode_stop(IncomingCircuit(ALICE))))
    with pytest.raises(ProtocolViolation, match="a status where a circuit was due"):
        await read_stop_request(ReadOnlyStream(encode_stop(RelayAnswer(RelayStatus.OK))))


async def test_a_caller_without_an_ed25519_key_is_a_violation() -> None:
    stop = StopMessage(type=StopMessage.CONNECT)
    stop.peer.id = b"\x12\x20" + bytes(32)
    with pytest.raises(ProtocolViolation, match="not an ed25519 key"):
        await read_stop_request(ReadOnlyStream(frame(stop.SerializeToString())))


def test_each_status_has_words() -> None:
    assert REASONS.keys() == set(RelayStatus)
