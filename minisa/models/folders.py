"""Where the user's own files go."""

from __future__ import annotations

import os
from pathlib import Path

from minisa.errors import MinisaError


def expand_user(path: str) -> Path:
    """The path with ~ as the home folder. MinisaError where there is none."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise MinisaError(
            f"no home folder for {path}: set HOME, or name a folder (of weights: by MINISA_WEIGHTS)"
        ) from error


def cache_dir() -> Path:
    """minisa's folder in $XDG_CACHE_HOME, which has to be absolute, or in ~/.cache. MinisaError without either."""
    cache = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification has relative paths ignored.
    return (Path(cache) if os.path.isabs(cache) else expand_user("~/.cache")) / "minisa"
