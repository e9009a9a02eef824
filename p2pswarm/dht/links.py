"""Requests to other nodes over streams that are kept: one stream per peer, one request on it at a time.

Opening a stream costs three round trips, so it stays open for the next request; the number kept is bounded and idle
ones are closed. Who is asked and what is made of failures is decided in `dht/node.py`.
"""

from collections import OrderedDict
from dataclasses import dataclass, field

import trio

from p2pswarm.core.errors import ConnectionLost, DeadlineExceeded, NetworkError, ProtocolViolation
from p2pswarm.core.ids import PeerId
from p2pswarm.dht.config import DhtConfig
from p2pswarm.dht.messages import DHT_LIMITS, DHT_PROTOCOL, Envelope, Failure, Request, decode_message, encode_message
from p2pswarm.net.network import Network, Stream
from p2pswarm.wire.frames import FrameDecoder


class FramedDhtStream:
    """A stream cut into messages. After any error or cancelled call it has lost its place: `reset` it."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._decoder = FrameDecoder(DHT_LIMITS, stream.peer_id)

    async def receive(self) -> Envelope | None:
        """The next message; None when the peer has closed its side."""
        while (frame := self._decoder.next_frame()) is None:
            data = await self._stream.read()
            if not data:
                if self._decoder.in_frame:
                    raise ConnectionLost(
                        f"{self._stream.peer_id} closed the stream within a message", self._stream.peer_id
                    )
                return None
            self._decoder.feed(data)
        return decode_message(frame, self._stream.peer_id)

    async def send(self, envelope: Envelope) -> None:
        await self._stream.write(*encode_message(envelope.message, envelope.sender_addresses))

    def reset(self) -> None:
        self._stream.reset()


@dataclass(slots=True)
class _Link:
    """The one stream to a peer, where there is one, and who may use it now."""

    used_at_s: float
    lock: trio.Lock = field(default_factory=trio.Lock)
    stream: FramedDhtStream | None = None
    num_failures: int = 0
    num_users: int = 0


class Links:
    """Asks peers, each at the end of its own stream."""

    def __init__(self, network: Network, config: DhtConfig) -> None:
        self._network = network
        self._config = config
        self._links: OrderedDict[PeerId, _Link] = OrderedDict()
        self._outgoing = trio.CapacityLimiter(config.max_outgoing_requests)

    @property
    def num_open(self) -> int:
        return sum(link.stream is not None for link in self._links.values())

    def is_open(self, peer_id: PeerId) -> bool:
        link = self._links.get(peer_id)
        return link is not None and link.stream is not None

    async def ask(
        self, peer_id: PeerId, request: Request, sender_addresses: tuple[str, ...], timeout_s: float
    ) -> Envelope:
        """The peer's answer. Requests to one peer take turns; when one gets no answer, those behind it fail with it.

        Raises `NetworkError` (`DeadlineExceeded` after `timeout_s` of its turn) or `ProtocolViolation`.
        """
        link = self._links.setdefault(peer_id, _Link(trio.current_time()))
        num_failures = link.num_failures
        link.num_users += 1
        try:
            async with link.lock, self._outgoing:
                if link.num_failures != num_failures:
                    raise ConnectionLost(f"an earlier request to {peer_id} failed", peer_id)
                return await self._ask_in_turn(peer_id, link, Envelope(request, sender_addresses), timeout_s)
        finally:
            link.num_users -= 1
            link.used_at_s = trio.current_time()
            if peer_id in self._links:  # all are closed while some are in use, when the node ends
                self._links.move_to_end(peer_id)
                self._close_surplus()

    def close_idle(self) -> None:
        """Closes what has not been used for `link_idle_s`."""
        used_before_s = trio.current_time() - self._config.link_idle_s
        for peer_id, link in list(self._links.items()):
            if link.used_at_s < used_before_s and not link.num_users:
                self._close(peer_id)

    def close_all(self) -> None:
        for peer_id in list(self._links):
            self._close(peer_id)

    async def _ask_in_turn(self, peer_id: PeerId, link: _Link, envelope: Envelope, timeout_s: float) -> Envelope:
        has_answer = False
        try:
            with trio.fail_after(timeout_s):
                answer = await self._exchange(peer_id, link, envelope)
            has_answer = True
        except trio.TooSlowError:
            raise DeadlineExceeded(f"{peer_id} did not answer a DHT request within {timeout_s:g} s", peer_id) from None
        finally:
            if not has_answer:
                link.num_failures += 1
                self._drop_stream(link)
        if isinstance(answer.message, Failure):
            raise ProtocolViolation(f"{peer_id} refused a DHT request: {answer.message.message}", peer_id)
        return answer

    async def _exchange(self, peer_id: PeerId, link: _Link, envelope: Envelope) -> Envelope:
        if link.stream is not None:
            try:
                return await self._send_and_receive(peer_id, link.stream, envelope)
            except NetworkError:  # closed by the peer while it was idle, which says nothing against a new one
                self._drop_stream(link)
        link.stream = FramedDhtStream(await self._network.open_stream(peer_id, DHT_PROTOCOL))
        return await self._send_and_receive(peer_id, link.stream, envelope)

    async def _send_and_receive(self, peer_id: PeerId, stream: FramedDhtStream, envelope: Envelope) -> Envelope:
        await stream.send(envelope)
        answer = await stream.receive()
        if answer is None:
            raise ConnectionLost(f"{peer_id} closed the stream instead of answering", peer_id)
        return answer

    def _close_surplus(self) -> None:
        surplus = len(self._links) - self._config.max_links
        if surplus > 0:
            unused = [peer_id for peer_id, link in self._links.items() if not link.num_users]
            for peer_id in unused[:surplus]:
                self._close(peer_id)

    def _close(self, peer_id: PeerId) -> None:
        self._drop_stream(self._links.pop(peer_id))

    @staticmethod
    def _drop_stream(link: _Link) -> None:
        if link.stream is not None:
            link.stream.reset()
            link.stream = None
