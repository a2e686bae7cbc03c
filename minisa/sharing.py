"""SharingPlan: which layers lead, which follow, and whose attention weights a follower's heads use.

Shared Attention (Liao & Vargas, arXiv 2407.12866): inside a span of layers one leader computes the softmax
attention weights and its followers apply them to values of their own.

    spans            3:6,19:21                 two spans, leaders named
    layers           0 1 2 3 4 5 6 7 ...
                           L     f             layer 6 has no query, no key, no softmax: it uses layer 3's weights
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from operator import index
from pathlib import Path
from typing import Any

from minisa.config import MAX_LAYERS, ModelConfig
from minisa.errors import MinisaError
from minisa.files import is_plain_name, read_json, write_whole

PLAN_VERSION = 1
_KEYS = ("version", "n_layers", "followers", "delta", "delta_sha256", "made")
_GROUP = re.compile(r"(?:(?P<leader>\d{1,9})\s*:\s*)?(?P<first>\d{1,9})(?:\s*-\s*(?P<last>\d{1,9}))?")


@dataclass(frozen=True, slots=True)
class Delta:
    """A safetensors file of weights made for a plan: they take the place of the checkpoint's (checkpoint/delta.py)."""

    path: Path
    sha256: str  # of the file's bytes


@dataclass(frozen=True, slots=True)
class SharingPlan:
    """For each layer, the layer whose attention weights it uses.

    sources: one entry a layer; a leader names itself.
    head_maps: one entry a layer; for a follower, the leader's query head whose weights each of its query heads
        uses, or None for the identity. Always None for a leader.
    delta: weights that go with the plan, or None for the checkpoint's own.
    Raises MinisaError when a layer cannot do what it is asked.
    """

    sources: tuple[int, ...]
    head_maps: tuple[tuple[int, ...] | None, ...]
    delta: Delta | None = None

    def __post_init__(self) -> None:
        if len(self.head_maps) != self.n_layers:
            raise MinisaError(f"plan: {len(self.head_maps)} head maps for {self.n_layers} layers: expected one each")
        for layer, source in enumerate(self.sources):
            if source == layer:
                if self.head_maps[layer] is not None:
                    raise MinisaError(f"plan: layer {layer} is a leader: only a follower has a head map")
            elif layer == 0:
                raise MinisaError("plan: layer 0 cannot follow: there is no layer before it")
            elif not 0 <= source < layer:
                raise MinisaError(
                    f"plan: layer {layer} cannot follow layer {source}: a leader comes before its followers"
                )
            elif self.sources[source] != source:
                raise MinisaError(
                    f"plan: layer {layer} cannot follow layer {source}, "
                    f"which itself follows layer {self.sources[source]}: name a leader"
                )

    @classmethod
    def none(cls, n_layers: int) -> SharingPlan:
        """Plain attention: every layer leads itself."""
        return cls(tuple(range(n_layers)), (None,) * n_layers)

    @classmethod
    def following(
        cls,
        n_layers: int,
        leaders: Mapping[int, int],
        head_maps: Mapping[int, Iterable[int]] | None = None,
        delta: Delta | None = None,
    ) -> SharingPlan:
        """From {follower: leader} and, where it is not the identity, {follower: head map}."""
        if not 0 < n_layers <= MAX_LAYERS:
            raise MinisaError(f"plan: n_layers is {n_layers}: expected 1 to {MAX_LAYERS}")
        for layer, leader in leaders.items():
            if not 0 <= layer < n_layers:
                raise MinisaError(f"plan: layer {layer} is outside the model, whose layers are 0 to {n_layers - 1}")
            if leader == layer:
                raise MinisaError(
                    f"plan: layer {layer} names itself as its leader: leave it out, or name an earlier one"
                )
        maps = {layer: tuple(heads) for layer, heads in (head_maps or {}).items()}
        return cls(
            tuple(leaders.get(layer, layer) for layer in range(n_layers)),
            tuple(maps.get(layer) for layer in range(n_layers)),
            delta,
        )

    @classmethod
    def parse(cls, spans: str, n_layers: int) -> SharingPlan:
        """From span notation, e.g. "27-30", "23-26,27-30", "22:23-26,27:28-30" or "none".

        A span without a leader follows the nearest earlier layer that is not itself a follower.
        """
        if spans.strip().lower() == "none":
            return cls.none(n_layers)
        named: dict[int, int | None] = {}  # follower -> its leader, if the notation says
        for group in spans.split(","):
            match = _GROUP.fullmatch(group.strip())
            if match is None:
                raise MinisaError(f"plan: {group.strip()!r} is not a span: expected e.g. 27-30, 3:6 or 22:23-26")
            first = int(match["first"])
            last = int(match["last"] or first)
            if last < first:
                raise MinisaError(f"plan: span {group.strip()!r} runs backwards: write {last}-{first}")
            if last >= n_layers:
                raise MinisaError(f"plan: layer {last} is outside the model, whose layers are 0 to {n_layers - 1}")
            for layer in range(first, last + 1):
                if layer in named:
                    raise MinisaError(f"plan: layer {layer} stands in two spans: it can follow one leader only")
                named[layer] = int(match["leader"]) if match["leader"] else None
        leaders: dict[int, int] = {}
        for layer, leader in named.items():
            if leader is None:
                leader = next((earlier for earlier in range(layer - 1, -1, -1) if earlier not in named), None)
                if leader is None:
                    raise MinisaError("plan: layer 0 cannot follow: there is no layer before it")
            leaders[layer] = leader
        return cls.following(n_layers, leaders)

    @property
    def n_layers(self) -> int:
        return len(self.sources)

    @property
    def leaders(self) -> tuple[int, ...]:
        """Layers that compute attention weights, whether or not anyone follows: these own a key cache."""
        return tuple(layer for layer, source in enumerate(self.sources) if source == layer)

    @property
    def followers(self) -> tuple[int, ...]:
        return tuple(layer for layer, source in enumerate(self.sources) if source != layer)

    @property
    def spans(self) -> dict[int, tuple[int, ...]]:
        """{leader: its followers}, for the leaders that have some."""
        return {
            leader: followed
            for leader in self.leaders
            if (followed := tuple(layer for layer in self.followers if self.sources[layer] == leader))
        }

    def __str__(self) -> str:
        """Span notation with every leader named; parse() of it gives this plan again, head maps and delta aside."""
        groups = []
        for leader, followers in self.spans.items():
            start = previous = followers[0]
            for layer in (*followers[1:], -1):
                if layer != previous + 1:
                    groups.append(f"{leader}:{start}" + (f"-{previous}" if previous > start else ""))
                    start = layer
                previous = layer
        return ",".join(groups) or "none"

    def picture(self) -> str:
        """A strip, ten layers a line, and a line for each span.

        "·" leads itself only, "L" leads a span, "f" follows.
        """
        glyphs = ["f" if source != layer else "·" for layer, source in enumerate(self.sources)]
        for leader in self.spans:
            glyphs[leader] = "L"
        lines = [f"{start:>5}  {' '.join(glyphs[start : start + 10])}" for start in range(0, self.n_layers, 10)]
        for leader, followers in self.spans.items():
            mapped = [layer for layer in followers if self.head_maps[layer] is not None]
            note = f" (head maps: {', '.join(map(str, mapped))})" if mapped else ""
            lines.append(f"layer {leader} leads {', '.join(map(str, followers))}{note}")
        return "\n".join(lines)

    def check(self, config: ModelConfig) -> SharingPlan:
        """This plan, if it fits the model; else MinisaError says where it does not."""
        if self.n_layers != config.n_layers:
            raise MinisaError(f"plan: made for {self.n_layers} layers, the model has {config.n_layers}")
        for layer, heads in enumerate(self.head_maps):
            if heads is None:
                continue
            if len(heads) != config.n_heads:
                raise MinisaError(
                    f"plan: layer {layer}'s head map has {len(heads)} entries: "
                    f"expected one for each of the model's {config.n_heads} query heads"
                )
            wrong = [head for head in heads if not 0 <= head < config.n_heads]
            if wrong:
                raise MinisaError(
                    f"plan: layer {layer}'s head map names head {wrong[0]}, the heads are 0 to {config.n_heads - 1}"
                )
        return self

    def save(self, path: str | Path, made: Mapping[str, Any] | None = None) -> None:
        """Write the plan as JSON, in the form that `load` reads. made: how it came to be, for people.

        Raises MinisaError where the delta lies in another folder: a plan names a file beside it; OSError where the
        plan cannot be written.
        """
        followers: dict[str, Any] = {str(layer): {"leader": self.sources[layer]} for layer in self.followers}
        for layer in self.followers:
            if self.head_maps[layer] is not None:
                followers[str(layer)]["heads"] = self.head_maps[layer]
        record: dict[str, Any] = {"version": PLAN_VERSION, "n_layers": self.n_layers, "followers": followers}
        if self.delta is not None:
            if self.delta.path.parent.resolve() != Path(path).parent.resolve():
                raise MinisaError(f"{path}: the plan's weights are {self.delta.path}: save it beside them")
            record |= {"delta": self.delta.path.name, "delta_sha256": self.delta.sha256}
        if made is not None:
            record["made"] = made
        text = json.dumps(record, indent=1)
        on_one_line = re.sub(r"\[[\d\s,]*\]", lambda numbers: json.dumps(json.loads(numbers[0])), text)
        write_whole(Path(path), on_one_line + "\n")

    @classmethod
    def load(cls, path: str | Path) -> SharingPlan:
        """Read a plan written by `save`:

        {"version": 1, "n_layers": 30, "followers": {"6": {"leader": 3, "heads": [0, 1, ...]}, ...},
         "delta": "plan.delta.safetensors", "delta_sha256": "...", "made": {...}}

        The last three are optional: a file of weights beside the plan, and how the plan was made, which is not read.
        Raises MinisaError for a file that is missing, of another version, or not of this form.
        """
        try:
            record = read_json(Path(path))
        except OSError as error:
            raise MinisaError(f"{path}: cannot read the plan: {error.strerror}") from error
        if record.get("version") != PLAN_VERSION:
            raise MinisaError(
                f"{path}: plan version {record.get('version')!r} is not supported: expected {PLAN_VERSION}"
            )
        if unknown := record.keys() - set(_KEYS):
            raise MinisaError(f"{path}: unknown key {min(unknown)!r}: expected {', '.join(_KEYS)}")
        try:
            entries = {int(layer): dict(entry) for layer, entry in record["followers"].items()}
            leaders = {layer: index(entry.pop("leader")) for layer, entry in entries.items()}
            head_maps = {layer: tuple(map(index, entry.pop("heads"))) for layer, entry in entries.items() if entry}
            if any(entries.values()):
                raise KeyError
            n_layers = index(record["n_layers"])
        except (AttributeError, KeyError, TypeError, ValueError):
            raise MinisaError(
                f'{path}: expected a whole number n_layers, and followers: {{"layer": {{"leader": layer, "heads": '
                "[head, ...]}, ...}, the heads only where they are mapped"
            ) from None
        delta, name = None, record.get("delta")
        if name is not None:
            if not isinstance(name, str) or not is_plain_name(name):
                raise MinisaError(f"{path}: delta is {name!r}: expected the name of a safetensors file beside the plan")
            delta = Delta(Path(path).resolve().parent / name, str(record.get("delta_sha256")))
        try:
            return cls.following(n_layers, leaders, head_maps, delta)
        except MinisaError as error:
            raise MinisaError(f"{path}: {error}") from None
