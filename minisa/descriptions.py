"""Reading a model's description: numbers and flags out of a file that may hold anything in their place.

All raise MinisaError, which names the key and what was expected. A value of null is one that is not there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from minisa.errors import MinisaError

Raw = Mapping[str, Any]


def bounded(key: str, value: int, limit: int) -> None:
    if not 0 < value <= limit:
        raise MinisaError(f"{key} is {value}: expected 1 to {limit}")


def within(key: str, number: float, bounds: tuple[float, float]) -> None:
    least, most = bounds
    if not least <= number <= most:
        raise MinisaError(f"{key} is {number!r}: expected {least:g} to {most:g}")


def flag(raw: Raw, key: str) -> bool:
    value = raw.get(key)
    if value is None:
        return False
    if not isinstance(value, bool):
        raise MinisaError(f"{key} is {value!r}: expected true or false")
    return value


def require_causal(raw: Raw, key: str) -> None:
    if key in raw and not flag(raw, key):  # transformers takes null for no as well
        value = "null" if raw[key] is None else "false"
        raise MinisaError(f"{key} is {value}: expected a model that looks back only, not one that makes embeddings")


def integer(raw: Raw, key: str, default: int | None = None) -> int:
    value = raw.get(key)
    if value is None:
        value = default
    if value is None:
        raise MinisaError(f"the model's description lacks {key!r}: is the file whole?")
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 1 << 63:
        raise MinisaError(f"{key} is {value!r}: expected a whole number, 1 or more, of 64 bits")
    return value


def optional_integer(raw: Raw, key: str) -> int | None:
    return None if raw.get(key) is None else integer(raw, key)


def number(raw: Raw, key: str, default: float | None = None) -> float:
    value = raw.get(key)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300:
        raise MinisaError(f"{key} is {value!r}: expected a finite number")
    return float(value)
