"""A part of a file by HTTP, gone on with where a connection was cut.

Every wait is bounded by the hub client's own timeouts (`HF_HUB_DOWNLOAD_TIMEOUT`); statuses that ask for patience
(429, 5xx) are retried by it.
"""

import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from huggingface_hub import constants, errors
from huggingface_hub.utils import hf_raise_for_status, http_stream_backoff  # type: ignore[attr-defined]

from p2pswarm.core.errors import CheckpointError

MAX_FRUITLESS_ATTEMPTS = 5
"""In a row, without one byte: then the hub is taken for unreachable."""
PAUSE_S = 1.0
"""Before going on: what cut the connection may need a moment."""
PARTIAL_CONTENT = 206


@dataclass(frozen=True, slots=True)
class FilePart:
    """Bytes `[start, end)` of a file of `file_bytes`."""

    file_name: str
    start: int
    end: int
    file_bytes: int


def read_part(url: str, headers: Mapping[str, str], part: FilePart) -> Iterator[bytes]:
    """The part's bytes as they come, exactly as many as it has.

    Raises what `huggingface_hub` does for a refusal or a hub that does not answer, and `CheckpointError` where the
    answer is not what was asked for.
    """
    position = part.start
    fruitless_attempts = 0
    while position < part.end:
        fruitless_attempts += 1
        try:
            for chunk in _read_once(url, headers, part, position):
                position += len(chunk)
                fruitless_attempts = 0
                yield chunk
        except errors.HfHubHTTPError:
            raise
        except errors.HTTPError:  # type: ignore[attr-defined]  # no answer, or cut
            if fruitless_attempts == MAX_FRUITLESS_ATTEMPTS:
                raise
        if position < part.end:
            if fruitless_attempts == MAX_FRUITLESS_ATTEMPTS:
                raise CheckpointError(f"the hub ends each answer before byte {position} of {part.file_name} comes")
            threading.Event().wait(PAUSE_S)


def _read_once(url: str, headers: Mapping[str, str], part: FilePart, position: int) -> Iterator[bytes]:
    """What one answer brings of the part from `position` on."""
    range_headers = {**headers, "Range": f"bytes={position}-{part.end - 1}", "Accept-Encoding": "identity"}
    with http_stream_backoff(
        "GET",
        url,
        headers=range_headers,
        timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
        retry_on_exceptions=(),
    ) as response:
        hf_raise_for_status(response)
        expected = f"bytes {position}-{part.end - 1}/{part.file_bytes}"
        answered = response.headers.get("Content-Range", "no Content-Range")
        if response.status_code != PARTIAL_CONTENT or answered != expected:
            raise CheckpointError(
                f"{response.url.host} does not give parts of {part.file_name}: asked for {expected}, it answered "
                f"{response.status_code} with {answered}; download the model to a folder and give that instead"
            )
        wanted_bytes = part.end - position
        for chunk in response.iter_raw():
            wanted_bytes -= len(chunk)
            if wanted_bytes < 0:
                raise CheckpointError(f"{response.url.host} sent more of {part.file_name} than it was asked for")
            yield chunk
