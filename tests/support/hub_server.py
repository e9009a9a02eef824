"""A model hub on loopback, with what a download meets in the wild: redirects to another host, ranges, gates, cuts."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import close_session

MODEL = "tiny/llama"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE_SUFFIXES = (".safetensors", ".bin")
"""Kept apart from git, on the host to which requests are redirected, and the only ones with a sha256."""


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    range: str | None
    token: str | None

    @property
    def range_bytes(self) -> int:
        """How many bytes were asked for."""
        assert self.range is not None
        start, end = self.range.removeprefix("bytes=").split("-")
        return int(end) - int(start) + 1


@dataclass
class HubServer:
    """Has one model, the files of `folder`. What it does wrong is set while it runs."""

    folder: Path
    revisions: tuple[str, ...] = ("main", COMMIT)
    good_token: str | None = None
    """With one, the model is gated: its files are for this token only."""
    unknown_token: str | None = None
    """One that no account has."""
    statuses: list[int] = field(default_factory=list)
    """What the next large answers are instead."""
    cuts: list[int] = field(default_factory=list)
    """After so many bytes of the body the connection of each next large answer is cut."""
    pace: threading.Event | None = None
    """Large answers stop in their middle until this is set."""
    damaged: bool = False
    """One byte in the middle of each large file is another one on its way."""
    knows_ranges: bool = True
    requests: list[Request] = field(default_factory=list)
    endpoint: str = ""
    storage: str = ""
    """Where large files are: the same machine by another name."""

    def large_requests(self) -> list[Request]:
        return [request for request in self.requests if request.path.startswith("/storage/")]

    def large_bytes_asked(self) -> int:
        return sum(request.range_bytes for request in self.large_requests())


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        token = (self.headers["Authorization"] or "").removeprefix("Bearer ") or None
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(Request(self.command, path, self.headers["Range"], token))
        if token is not None and token == self.hub.unknown_token:
            self._send(b"", {"X-Error-Message": "Invalid credentials in Authorization header"}, status=401)
        elif path.startswith(f"/api/models/{MODEL}"):
            self._answer_info(path)
        elif path.startswith(f"/{MODEL}/resolve/"):
            self._answer_resolve(*path.removeprefix(f"/{MODEL}/resolve/").split("/", 1), token)
        elif path.startswith("/storage/") and self.hub.statuses:
            self._send(b"", {}, status=self.hub.statuses.pop(0))
        elif path.startswith("/storage/"):
            self._send_large(self.hub.folder / path.removeprefix("/storage/"))
        else:
            self._refuse(404, "RepoNotFound")

    def _answer_info(self, path: str) -> None:
        revision = path.removeprefix(f"/api/models/{MODEL}").removeprefix("/revision/") or "main"
        if revision not in self.hub.revisions:
            self._refuse(404, "RevisionNotFound")
            return
        siblings = [describe(file) for file in sorted(self.hub.folder.iterdir())]
        self._send(json.dumps({"id": MODEL, "sha": COMMIT, "siblings": siblings}).encode(), {})

    def _answer_resolve(self, revision: str, file_name: str, token: str | None) -> None:
        file = self.hub.folder / file_name
        if self.hub.good_token is not None and token != self.hub.good_token:
            self._refuse(401 if token is None else 403, "GatedRepo")
        elif revision not in self.hub.revisions:
            self._refuse(404, "RevisionNotFound")
        elif not file.exists():
            self._refuse(404, "EntryNotFound")
        elif file.suffix in LARGE_SUFFIXES:
            headers = {
                "Location": f"{self.hub.storage}/storage/{file_name}",
                "X-Linked-Size": str(file.stat().st_size),
                "X-Linked-Etag": f'"{sha256(file)}"',
                "X-Repo-Commit": COMMIT,
            }
            self._send(b"", headers, status=302)
        else:
            self._send(file.read_bytes(), {"ETag": f'"{blob_id(file)}"', "X-Repo-Commit": COMMIT})

    def _send_large(self, file: Path) -> None:
        content = bytearray(file.read_bytes())
        if self.hub.damaged:
            content[len(content) // 2] ^= 1
        asked = self.headers["Range"]
        if asked is None or not self.hub.knows_ranges:
            self._send_body(bytes(content), {}, 200)
            return
        start, end = map(int, asked.removeprefix("bytes=").split("-"))
        self._send_body(
            bytes(content[start : end + 1]), {"Content-Range": f"bytes {start}-{end}/{len(content)}"}, status=206
        )

    def _send_body(self, body: bytes, headers: dict[str, str], status: int) -> None:
        """Perhaps not all of it, or not at once."""
        self._send(b"", headers, status=status, length=len(body))
        half = len(body) // 2
        if self.hub.cuts:
            self.wfile.write(body[: self.hub.cuts.pop(0)])
            self.close_connection = True
        elif self.hub.pace is not None:
            self.wfile.write(body[:half])
            self.wfile.flush()
            self.hub.pace.wait()
            self.wfile.write(body[half:])
        else:
            self.wfile.write(body)

    def _send(self, body: bytes, headers: dict[str, str], *, status: int = 200, length: int | None = None) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body) if length is None else length)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def _refuse(self, status: int, code: str) -> None:
        self._send(b"", {"X-Error-Code": code, "X-Error-Message": code}, status=status)


class QuietServer(ThreadingHTTPServer):
    """Says nothing of clients that leave in the middle."""

    def handle_error(self, request: object, client_address: object) -> None:
        pass


def describe(file: Path) -> dict[str, object]:
    """A file as the hub lists it."""
    size = file.stat().st_size
    lfs = {"lfs": {"sha256": sha256(file), "size": size, "pointerSize": 134}}
    return {
        "rfilename": file.name,
        "size": size,
        "blobId": blob_id(file),
        **(lfs if file.suffix in LARGE_SUFFIXES else {}),
    }


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def blob_id(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


@contextmanager
def serve_hub(folder: Path) -> Iterator[HubServer]:
    """A hub with the model in `folder`, until the context ends."""
    server = QuietServer(("127.0.0.1", 0), Handler)
    hub = HubServer(folder, endpoint=f"http://127.0.0.1:{server.server_port}")
    hub.storage = f"http://localhost:{server.server_port}"
    server.RequestHandlerClass = type("HubHandler", (Handler,), {"hub": hub})
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        if hub.pace is not None:
            hub.pace.set()
        server.shutdown()
        server.server_close()
        thread.join()


def use_hub(hub: HubServer, monkeypatch: pytest.MonkeyPatch, downloads: Path) -> None:
    """Has `huggingface_hub` in this process ask this hub, which it reads from its environment when it is imported."""
    close_session()
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(downloads))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(downloads / "no-token"))
