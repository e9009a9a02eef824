"""Asking a peer to open a fresh connection to us: how a node learns whether it can be dialled, and where it is seen.

Protocol `/p2pswarm/probe/1`, one question a stream, each side a JSON object in one piece and then the end of its side:

    asker    {"ports": [4001]}                                             at most 4; none: only where it is seen
    prober   {"seen_at": "/ip4/203.0.113.7/tcp/51234", "reached": [4001]}

The prober dials those ports at the host that it sees the asker at, and nowhere else, so that nobody can be made to
knock at a third party's door. Each dial is a new TCP connection from a port of its own, and a handshake that proves the
asker's peer id: the connection that the question came over says nothing, for a firewall lets answers through. What
follows from the reports is for `net/nat/reachability.py`.
"""

import contextlib
import json
import logging
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from random import Random

import trio

from p2pswarm.core.errors import ConfigError, DeadlineExceeded, NetworkError, ProtocolViolation, RemoteError
from p2pswarm.core.ids import PeerId, ProtocolId
from p2pswarm.net.addresses import MAX_PORT, TcpAddress, parse_tcp_address
from p2pswarm.net.nat.reachability import ProbeReport
from p2pswarm.net.network import Network, Stream

PROBE_PROTOCOL = ProtocolId("/p2pswarm/probe/1")
MAX_PORTS = 4
"""IPv4 and IPv6, each as listened on and as forwarded by a router."""
MAX_PROBERS = 4
"""Asked in one round."""
DIAL_TIMEOUT_S = 2.5
"""A packet that a router drops is never answered; over half the globe TCP and handshake take a second."""
ANSWER_TIMEOUT_S = DIAL_TIMEOUT_S + 2.5
"""Until the prober must have answered, finding it and opening a stream to it included."""
MAX_MESSAGE_BYTES = 1024
MAX_PROBES_AT_ONCE = 8
"""Of all askers; more are turned away, and ask somebody else."""
MAX_QUESTIONS_PER_PEER = 6
QUESTIONS_PERIOD_S = 60.0
"""In which a peer may ask so often: twice in a start, and once more after each change."""
MAX_REMEMBERED_ASKERS = 1024

logger = logging.getLogger(__name__)


class Probing:
    """Serves those who ask."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._num_at_once = 0
        self._asked_at_s: OrderedDict[PeerId, list[float]] = OrderedDict()

    def serve(self) -> None:
        self._network.serve(PROBE_PROTOCOL, self._answer)

    async def _answer(self, stream: Stream) -> None:
        with trio.move_on_after(ANSWER_TIMEOUT_S) as silence:
            ports = _read_ports(await _receive(stream), stream.peer_id)
        if silence.cancelled_caught:
            stream.reset()
            return
        path = self._network.path(stream.peer_id)
        seen_at = path.remote if path is not None else None
        if seen_at is None or self._num_at_once >= MAX_PROBES_AT_ONCE or not self._may_ask(stream.peer_id):
            stream.reset()
            return
        self._num_at_once += 1
        try:
            reached = await self._dial_all([TcpAddress(seen_at.kind, seen_at.host, port) for port in ports], stream)
        finally:
            self._num_at_once -= 1
        await stream.write(json.dumps({"seen_at": str(seen_at), "reached": reached}).encode())

    async def _dial_all(self, addresses: Sequence[TcpAddress], stream: Stream) -> list[int]:
        reached = []

        async def dial(address: TcpAddress) -> None:
            try:
                await self._network.dial_fresh(address, stream.peer_id)
                reached.append(address.port)
            except NetworkError as error:
                logger.debug("%s cannot be dialled at %s: %s", stream.peer_id, address, error)

        with trio.move_on_after(DIAL_TIMEOUT_S):
            async with trio.open_nursery() as nursery:
                for address in addresses:
                    nursery.start_soon(dial, address)
        return reached

    def _may_ask(self, peer_id: PeerId) -> bool:
        now_s = trio.current_time()
        lately = [at_s for at_s in self._asked_at_s.pop(peer_id, []) if at_s > now_s - QUESTIONS_PERIOD_S]
        is_allowed = len(lately) < MAX_QUESTIONS_PER_PEER
        self._asked_at_s[peer_id] = [*lately, now_s] if is_allowed else lately
        if len(self._asked_at_s) > MAX_REMEMBERED_ASKERS:
            self._asked_at_s.popitem(last=False)
        return is_allowed


def whom_to_ask(hosts: Mapping[PeerId, str], random: Random) -> list[PeerId]:
    """The peers in the order in which to ask them, given the machine of each: one on every machine first, since those
    beside us see no router that others would have to get through. Pure."""
    peers = list(hosts)
    random.shuffle(peers)
    num_before: Counter[str] = Counter()
    turns: dict[PeerId, int] = {}
    for peer_id in peers:
        turns[peer_id] = num_before[hosts[peer_id]]
        num_before[hosts[peer_id]] += 1
    return sorted(peers, key=turns.__getitem__)


async def ask_peers(network: Network, peers: Iterable[PeerId], ports: Sequence[int]) -> list[ProbeReport]:
    """What peers found who tried to dial these ports of ours, of at most `MAX_PROBERS`; those who cannot tell are left
    out. Takes `ANSWER_TIMEOUT_S` at most."""
    reports: list[ProbeReport] = []

    async def ask(peer_id: PeerId) -> None:
        try:
            reports.append(await ask_peer(network, peer_id, ports))
        except (NetworkError, RemoteError) as error:
            logger.debug("no probe by %s: %s", peer_id, error)

    async with trio.open_nursery() as nursery:
        for peer_id, _ in zip(peers, range(MAX_PROBERS), strict=False):
            nursery.start_soon(ask, peer_id)
    return reports


async def ask_peer(network: Network, peer_id: PeerId, ports: Sequence[int]) -> ProbeReport:
    """What the peer found who tried to dial these ports. Raises `NetworkError`; `ProtocolViolation` for one who does
    not speak the protocol, or talks nonsense."""
    asked = list(dict.fromkeys(ports))[:MAX_PORTS]
    with trio.move_on_after(ANSWER_TIMEOUT_S):
        stream = await network.open_stream(peer_id, PROBE_PROTOCOL)
        try:
            await stream.write(json.dumps({"ports": asked}).encode())
            await stream.close_write()
            return _read_report(await _receive(stream), peer_id, asked)
        finally:
            stream.reset()
    raise DeadlineExceeded(f"{peer_id} did not tell within {ANSWER_TIMEOUT_S:g} s whether it can dial us", peer_id)


async def _receive(stream: Stream) -> bytes:
    message = b""
    while part := await stream.read(MAX_MESSAGE_BYTES):
        message += part
        if len(message) > MAX_MESSAGE_BYTES:
            raise ProtocolViolation(f"{stream.peer_id} sent a probe message over {MAX_MESSAGE_BYTES} bytes")
    return message


def _read_ports(message: bytes, asker: PeerId) -> list[int]:
    match _parsed(message):
        case {"ports": [*ports]} if len(ports) <= MAX_PORTS and all(map(_is_port, ports)):
            return list(dict.fromkeys(ports))
    raise ProtocolViolation(f"{asker} asked for a probe of {message[:80]!r}, wanted up to {MAX_PORTS} ports", asker)


def _read_report(message: bytes, prober: PeerId, asked: Sequence[int]) -> ProbeReport:
    match _parsed(message):
        case {"seen_at": str(seen_at), "reached": [*reached]} if all(port in asked for port in reached):
            return ProbeReport(prober, _read_host(seen_at, prober), frozenset(reached))
    raise ProtocolViolation(f"{prober} answered {message[:80]!r} to a question for ports {asked}", prober)


def _read_host(seen_at: str, prober: PeerId) -> TcpAddress:
    with contextlib.suppress(ConfigError):
        address = parse_tcp_address(seen_at)
        if address.is_dialable and address.kind in ("ip4", "ip6"):
            return address
    raise ProtocolViolation(f"{prober} says it sees us at {seen_at[:80]!r}, wanted an IP address and port", prober)


def _parsed(message: bytes) -> object:
    try:
        return json.loads(message)
    except (ValueError, RecursionError):
        return None


def _is_port(value: object) -> bool:
    return type(value) is int and 0 < value <= MAX_PORT
