"""A server on loopback that hands out files as Hugging Face does, with the faults that networks have."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

BIG = os.urandom(3 << 20)  # a dozen blocks


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@dataclass
class Publisher:
    """What the server has, how it behaves, and what it was asked: (path, Range, Authorization)."""

    files: dict[str, bytes] = field(default_factory=dict)
    states_sha256: bool = True  # before it redirects to its storage, which is another host; else no redirect
    states_size: bool = True
    knows_ranges: bool = True
    token: str | None = None
    redirect: str | None = None
    statuses: list[int] = field(default_factory=list)  # answered in place of the next files
    cut: list[int] = field(default_factory=list)  # the next answers close after so many bytes
    pause: float = 0.0  # seconds between blocks of 64 kB
    asked: list[tuple[str, str | None, str | None]] = field(default_factory=list)
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/repo/"

    def ranges(self, name: str) -> list[str | None]:
        """The Range of every request for the content of a file."""
        folder = "/store/" if self.states_sha256 else "/repo/"
        return [range_ for path, range_, _ in self.asked if path == folder + name]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Any

    def log_message(self, *_: object) -> None:
        pass

    def _send(self, status: int, **headers: object) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()

    def do_GET(self) -> None:
        publisher: Publisher = self.server.publisher
        range_, authorization = self.headers["Range"], self.headers["Authorization"]
        publisher.asked.append((self.path, range_, authorization))
        where, name = self.path.lstrip("/").split("/", 1)
        content = publisher.files.get(name)
        if publisher.token and where == "repo" and authorization != f"Bearer {publisher.token}":
            return self._send(403 if authorization else 401, Content_Length=0)
        if content is None:
            return self._send(404, Content_Length=0)
        if publisher.redirect:
            return self._send(302, Location=publisher.redirect, Content_Length=0)
        if publisher.states_sha256 and where == "repo":
            storage = f"http://localhost:{publisher.port}/store/{name}"
            return self._send(302, Location=storage, X_Linked_ETag=f'"{sha256(content)}"', Content_Length=0)
        if publisher.statuses:
            return self._send(publisher.statuses.pop(0), Content_Length=0)
        start = int(range_.removeprefix("bytes=").rstrip("-")) if range_ and publisher.knows_ranges else 0
        if start >= len(content) > 0:
            return self._send(416, Content_Length=0)
        length = {"Content_Length": len(content) - start} if publisher.states_size else {"Connection": "close"}
        self._send(206 if start else 200, **length)
        body = content[start:]
        if publisher.cut:
            body, self.close_connection = body[: publisher.cut.pop(0)], True
        try:
            for at in range(0, len(body), 1 << 16):
                self.wfile.write(body[at : at + (1 << 16)])
                time.sleep(publisher.pause)
        except OSError:  # the client has left
            self.close_connection = True
        return None


@pytest.fixture
def publisher() -> Iterator[Publisher]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.publisher = Publisher(port=server.server_address[1])  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield server.publisher  # type: ignore[attr-defined]
    finally:
        server.shutdown()
        server.server_close()
