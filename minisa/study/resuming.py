"""Work that was broken off goes on only with the settings and the model it was begun with."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from minisa.checkpoint import open_checkpoint
from minisa.checkpoint.layouts import BESIDE_THE_WEIGHTS
from minisa.errors import MinisaError
from minisa.files import open_plain
from minisa.models.registry import resolve

EDGE = 64 << 10  # bytes


def fingerprint(model: str) -> str:
    """What tells checkpoints of one name apart: of each file its name, its size, and the first and last EDGE bytes.

    The files are those of the weights, their description and the tokenizer, of what --model names.
    Raises MinisaError where they cannot be read.
    """
    path, _ = resolve(model)
    files = {file.path for file in open_checkpoint(path).files}
    files |= {file for pattern in BESIDE_THE_WEIGHTS for file in path.glob(pattern) if file.is_file()}
    digest = hashlib.sha256()
    try:
        for name in sorted(files):
            with open_plain(name) as file:
                first = file.read(EDGE)
                size = file.seek(0, os.SEEK_END)
                file.seek(max(size - EDGE, 0))
                digest.update(repr((name.name, size)).encode() + first + file.read(EDGE))
    except OSError as error:
        raise MinisaError(f"{error.filename or path}: cannot read the checkpoint: {error.strerror}") from error
    return digest.hexdigest()[:16]


def require_same_settings(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """MinisaError that names the first setting which is another now; path: the file that keeps the work."""
    for key, value in now.items():
        if before.get(key) != value:
            raise MinisaError(
                f"{path}: begun with {key} {before.get(key)}, now it is {value}: remove the file, or give another --out"
            )


@contextmanager
def left_by(what: str, path: Path) -> Iterator[None]:
    """What goes wrong inside, reading what the work left at a path, is a MinisaError that says the file is none."""
    try:
        yield
    except (
        MinisaError, OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError
    ) as error:  # fmt: skip
        raise MinisaError(f"{path}: not what {what} leaves: remove it to begin again") from error
