"""One page over HTTP, for Prometheus: what it needs of HTTP/1.1 and not more, so that nothing else can go wrong.

A connection has one short request and is closed after the answer. Who sends too much, too slowly or nonsense is told so
or dropped, and takes nothing from the server but a few kilobytes for a few seconds.
"""

from collections.abc import Callable

import trio

from p2pswarm.core.errors import ConfigError
from swarmd.http_address import HttpAddress

PATH = "/metrics"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
MAX_REQUEST_BYTES = 8192
TIMEOUT_S = 5.0
"""For the request and the answer together; Prometheus itself gives up after 10 s."""
MAX_CONNECTIONS = 16
READ_BYTES = 4096


class MetricsServer:
    """Answers with the page as it is made at that moment."""

    def __init__(self, make_page: Callable[[], bytes]) -> None:
        self._make_page = make_page
        self._num_connections = 0

    async def run(self, address: HttpAddress, *, task_status: trio.TaskStatus[str] = trio.TASK_STATUS_IGNORED) -> None:
        """Serves until cancelled; tells the page's URL. Raises `ConfigError` where it cannot listen there."""
        try:
            listeners = await trio.open_tcp_listeners(address.port, host=address.host)
        except OSError as error:
            raise ConfigError(
                f"metrics: cannot listen on {address.host}:{address.port}: {error.strerror or error}"
            ) from error
        task_status.started(address.url(listeners[0].socket.getsockname()[1]))
        await trio.serve_listeners(self.answer, listeners)

    async def answer(self, stream: trio.abc.Stream) -> None:
        """Deals with one connection; who called closes it."""
        if self._num_connections >= MAX_CONNECTIONS:
            return
        self._num_connections += 1
        try:
            with trio.move_on_after(TIMEOUT_S):
                request = await _read_request(stream)
                if request is not None:
                    await stream.send_all(self._response(request))
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # whoever asked has gone
        finally:
            self._num_connections -= 1

    def _response(self, request: bytes) -> bytes:
        words = request.partition(b"\r\n")[0].split(b" ")
        if len(request) >= MAX_REQUEST_BYTES:
            return response("431 Request Header Fields Too Large")
        if len(words) != 3 or not words[2].startswith(b"HTTP/1."):
            return response("400 Bad Request")
        method, path = words[0], words[1].partition(b"?")[0]
        if path != PATH.encode():
            return response("404 Not Found")
        if method not in (b"GET", b"HEAD"):
            return response("405 Method Not Allowed", extra="Allow: GET, HEAD\r\n")
        return response("200 OK", self._make_page(), has_body=method == b"GET", content_type=CONTENT_TYPE)


async def _read_request(stream: trio.abc.Stream) -> bytes | None:
    """Up to the empty line, or as much as is too much; None where nothing whole comes."""
    request = b""
    while b"\r\n\r\n" not in request and len(request) < MAX_REQUEST_BYTES:
        data = await stream.receive_some(READ_BYTES)
        if not data:
            return None
        request += data
    return request


def response(
    status: str, body: bytes = b"", *, has_body: bool = True, content_type: str = "text/plain", extra: str = ""
) -> bytes:
    """A whole answer; `body` without `has_body` only tells its length, as HEAD wants it."""
    head = (
        f"HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\n"
        f"{extra}Connection: close\r\n\r\n"
    )
    return head.encode() + (body if has_body else b"")
