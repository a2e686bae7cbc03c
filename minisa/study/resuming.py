"""Work that was broken off goes on only with the settings it was begun with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minisa.errors import MinisaError


def require_same_settings(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """MinisaError that names the first setting which is another now; path: the file that keeps the work."""
    for key, value in now.items():
        if before.get(key) != value:
            raise MinisaError(
                f"{path}: begun with {key} {before.get(key)}, now it is {value}: remove the file, or give another --out"
            )
