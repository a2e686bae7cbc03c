"""What a search finds out, and the file in which it is kept, so that a search broken off can go on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minisa.errors import MinisaError
from minisa.sharing import SharingPlan
from minisa.study.resuming import require_same_settings
from minisa.untrusted import MAX_JSON, read_plain, write_whole

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


def read_findings(path: Path, settings: Mapping[str, Any]) -> Findings:
    """What an earlier run left. MinisaError if that was of other settings, naming one, or if the file is broken."""
    if not path.exists():
        return Findings()
    try:
        record = json.loads(read_plain(path, MAX_JSON, "state of a search"))
        before = dict(record["settings"])
        pairs = {
            tuple(map(int, key.split(":"))): (error, tuple(heads)) for key, (error, heads) in record["pairs"].items()
        }
        maps = {
            spans: {int(layer): tuple(heads) for layer, heads in of.items()} for spans, of in record["maps"].items()
        }
        findings = Findings(pairs, dict(record["measured"]), maps)  # type: ignore[arg-type]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise MinisaError(f"{path}: not what a search leaves ({error}): remove it to begin again") from error
    require_same_settings(path, before, settings)
    return findings


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
