"""What a search finds out, and the file in which it is kept, so that a search broken off can go on."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minisa.config import ModelConfig
from minisa.errors import MinisaError
from minisa.files import MAX_JSON, read_plain, write_whole
from minisa.sharing import SharingPlan
from minisa.study.resuming import left_by, require_same_settings

Heads = tuple[int, ...]


@dataclass(slots=True)
class Findings:
    """What a search has found out so far.

    pairs: {(leader, follower): (error, head map)}. measured: {plan's key: divergence}. maps: {spans: head maps made
    with the errors before them seen, by follower}.
    """

    pairs: dict[tuple[int, int], tuple[float, Heads]] = field(default_factory=dict)
    measured: dict[str, float] = field(default_factory=dict)
    maps: dict[str, dict[int, Heads]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Point:
    """A plan and its divergence, nats a token."""

    plan: SharingPlan
    divergence: float


def read_findings(path: Path, settings: Mapping[str, Any], config: ModelConfig) -> Findings:
    """What an earlier run on a model of this config left.

    Raises MinisaError if that was of other settings, naming one, or if the file is broken.
    """
    if not path.exists():
        return Findings()
    with left_by("a search", path):
        record = json.loads(read_plain(path, MAX_JSON, "state of a search"))
        before = dict(record["settings"])
    require_same_settings(path, before, settings)
    with left_by("a search", path):
        return _findings(record, config)


def _findings(record: Mapping[str, Any], config: ModelConfig) -> Findings:
    """Raises ValueError and its like for what Search would stumble over."""
    every = {
        f"{leader}:{follower}": (leader, follower) for follower in range(config.n_layers) for leader in range(follower)
    }
    if record["pairs"] and record["pairs"].keys() != every.keys():
        raise ValueError("pairs of layers are missing, or are not this model's")
    pairs = {every[key]: (_number(error), _heads(heads, config)) for key, (error, heads) in record["pairs"].items()}
    if any(error <= 0 for error, _ in pairs.values()):
        raise ValueError("an error is not above 0")
    measured = {key: _number(divergence) for key, divergence in record["measured"].items()}
    maps = {}
    for spans, of in record["maps"].items():
        layers = {str(layer): layer for layer in SharingPlan.parse(spans, config.n_layers).followers}
        maps[spans] = {layers[layer]: _heads(heads, config) for layer, heads in of.items()}
    return Findings(pairs, measured, maps)


def _number(value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"{value!r} is no number")
    return float(value)


def _heads(value: Any, config: ModelConfig) -> Heads:
    if len(value) != config.n_heads or not all(type(head) is int and 0 <= head < config.n_heads for head in value):
        raise ValueError(f"{value!r} is no head map")
    return tuple(value)


def write_findings(path: Path, settings: Mapping[str, Any], findings: Findings) -> None:
    """Keep what has been found, whole at every moment."""
    record = {
        "settings": settings,
        "pairs": {f"{leader}:{follower}": found for (leader, follower), found in findings.pairs.items()},
        "measured": findings.measured,
        "maps": findings.maps,
    }
    try:
        write_whole(path, json.dumps(record))
    except OSError as error:
        raise MinisaError(f"{path}: cannot keep the state of the search: {error.strerror}") from error
