"""The state of long work in one file, so that the same command goes on where it was broken off."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from minisa.checkpoint import open_checkpoint
from minisa.checkpoint.layouts import BESIDE_THE_WEIGHTS
from minisa.errors import MinisaError
from minisa.files import sha256_of, written_whole
from minisa.models.registry import resolve


def read_state(path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What write_state left there; empty if there is no such file.

    Raises MinisaError for a file of other settings, naming the first that differs, and for any other file.
    """
    if not path.exists():
        return {}
    try:
        kept = torch.load(path, map_location="cpu", weights_only=True)  # runs no code
        before, state = kept["settings"], dict(kept["state"])
    except Exception as error:  # torch.load raises whatever its parts do
        raise MinisaError(f"{path}: not the state of this command: remove it to begin again") from error
    for key, value in settings.items():
        if before.get(key) != value:
            raise MinisaError(
                f"{path}: begun with {key} {before.get(key)}, now it is {value}: remove the file, or give another --out"
            )
    return state


def write_state(path: Path, settings: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Keep numbers, strings, containers and tensors; the file is whole at every moment."""
    try:
        with written_whole(path) as partial:
            torch.save({"settings": dict(settings), "state": dict(state)}, partial)
    except (OSError, RuntimeError) as error:  # torch says RuntimeError for a disk that is full
        raise MinisaError(f"{path}: cannot keep the state of the work: {error}") from error


def fingerprint(model: str) -> str:
    """A hash of the checkpoint's files, weights, description and tokenizer, which tells those of one name apart."""
    path, _ = resolve(model)
    files = {file.path for file in open_checkpoint(path).files}
    files |= {file for pattern in BESIDE_THE_WEIGHTS for file in path.glob(pattern) if file.is_file()}
    hashes = [(file.name, sha256_of(file)) for file in sorted(files)]
    return hashlib.sha256(repr(hashes).encode()).hexdigest()[:16]
