"""A TCP proxy that keeps what went through it: what somebody on the wire, or a stranger at its end, gets to see."""

from dataclasses import dataclass, field

import trio

HOST = "127.0.0.1"
CHUNK_BYTES = 1 << 16


@dataclass(slots=True)
class Recording:
    """All connections together, each direction in the order of its bytes."""

    port: int = 0
    """Where to connect instead of the target."""
    from_target: bytearray = field(default_factory=bytearray)
    to_target: bytearray = field(default_factory=bytearray)

    @property
    def everything(self) -> bytes:
        return bytes(self.from_target + self.to_target)


async def recording_proxy(
    target_port: int, *, task_status: trio.TaskStatus[Recording] = trio.TASK_STATUS_IGNORED
) -> None:
    """`recording = await nursery.start(recording_proxy, port)`; leads every connection on, until cancelled."""

    async def lead(client: trio.SocketStream) -> None:
        async with await trio.open_tcp_stream(HOST, target_port) as target, trio.open_nursery() as directions:
            directions.start_soon(_carry, client, target, recording.to_target)
            directions.start_soon(_carry, target, client, recording.from_target)

    (listener,) = await trio.open_tcp_listeners(0, host=HOST)
    recording = Recording(listener.socket.getsockname()[1])
    task_status.started(recording)
    await trio.serve_listeners(lead, [listener])


async def _carry(source: trio.SocketStream, sink: trio.SocketStream, record: bytearray) -> None:
    try:
        while data := await source.receive_some(CHUNK_BYTES):
            record += data
            await sink.send_all(data)
        await sink.send_eof()
    except (trio.BrokenResourceError, trio.ClosedResourceError):  # one end has gone: so does the other
        await trio.aclose_forcefully(sink)
