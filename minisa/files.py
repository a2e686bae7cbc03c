"""Small files: JSON read within bounds, and files that are written whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader, TextIOWrapper
from pathlib import Path
from typing import Any

from minisa.errors import MinisaError

MAX_JSON = 32 << 20  # bytes; the largest vocabularies take 20 MB
MAX_VALUES = 1 << 21  # in one header: each takes up to 100 bytes of memory, and the largest vocabularies have a million


def open_plain(path: Path) -> BufferedReader:
    """The file at a path, open for reading. Raises OSError, also for a pipe or a device, which might never end."""
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "not a file", str(path))
    return path.open("rb")


def read_plain(path: Path, limit: int, what: str) -> bytes:
    """All of a file. Raises MinisaError where it is longer than `limit` bytes, OSError where it cannot be read."""
    with open_plain(path) as file:
        if os.fstat(file.fileno()).st_size > limit:
            raise MinisaError(f"{path}: longer than {limit} bytes: this is no {what}")
        return file.read(limit)


def cache_dir() -> Path:
    """The folder for what can be made or fetched again: minisa in $XDG_CACHE_HOME, or in ~/.cache."""
    cache = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification ignores a relative path: what is loaded must not depend on the current folder.
    return Path(cache if os.path.isabs(cache) else os.path.expanduser("~/.cache")) / "minisa"


def read_text(path: Path) -> str:
    """All of a UTF-8 file, its lines ending in "\\n". Raises UnicodeDecodeError, OSError where it cannot be read."""
    with TextIOWrapper(open_plain(path), encoding="utf-8") as file:
        return file.read()


def is_plain_name(name: str) -> bool:
    """Whether a file of that name lies beside the file that names it: no folders, nothing hidden."""
    return re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", name) is not None


def sha256_of(path: Path) -> str:
    """The digest of a file in hexadecimal. Raises OSError where it cannot be read."""
    with open_plain(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A temporary name to write under; the file gets its own name at the end, and nothing is left after an error."""
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "not a file", str(path))
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Write a text file that has its name only once it is whole. Raises OSError where it cannot be written."""
    with written_whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises MinisaError, or OSError when the file cannot be read."""
    return parse_json(read_plain(path, MAX_JSON, "model's description"), str(path))


def parse_json(text: bytes, where: str) -> dict[str, Any]:
    """The object in a JSON text; `where` names it in messages. Raises MinisaError for anything else."""
    if sum(map(text.count, (b",", b"[", b"{"))) > MAX_VALUES:
        raise MinisaError(f"{where} has more than {MAX_VALUES} values: expected the description of a model")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise MinisaError(f"{where} is not valid JSON ({error}): fetch the file again") from None
    if not isinstance(value, dict):
        raise MinisaError(f"{where} is a JSON {type(value).__name__}: expected an object")
    return value
