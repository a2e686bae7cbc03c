"""What one evaluation compares: the plain model, plans of attention sharing, and rivals of theirs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from minisa.config import ModelConfig
from minisa.engine import LLM
from minisa.errors import MinisaError
from minisa.models.registry import ModelEntry, choose_plan
from minisa.sharing import SharingPlan
from minisa.study.baselines import Baseline, altered, slot_bytes

PLAIN = "plain"


@dataclass(frozen=True, slots=True)
class Variant:
    """A model with a plan, a rival's changes, or neither.

    name: as it was given. sa: what `minisa.load` takes for the plan. identity: of what the variant is, wherever its
    files lie; another one once a file that it names has changed.
    """

    name: str
    sa: str | None
    plan: SharingPlan
    rival: Baseline

    @property
    def identity(self) -> str:
        rival, delta = self.rival, self.plan.delta
        plan = replace(self.plan, delta=None)
        content = (plan, sorted(rival.dropped), sorted(rival.borrowed.items()), rival.int8)
        if delta is not None:
            content += (delta.sha256,)  # type: ignore[assignment]
        return hashlib.sha256(repr(content).encode()).hexdigest()[:16]

    @property
    def kind(self) -> str:
        """For people and plots: plain, sa, drop, cla or kv-int8, or two of them with a plus."""
        kinds = {
            "sa": self.plan.followers,
            "drop": self.rival.dropped,
            "cla": self.rival.borrowed,
            "kv-int8": self.rival.int8,
        }
        return "+".join(kind for kind, present in kinds.items() if present) or PLAIN

    def kv_bytes(self, config: ModelConfig) -> int:
        """Bytes a token takes in the KV cache in bf16, or with what the rival makes of it."""
        return slot_bytes(config, self.plan, self.rival)

    def saved(self, config: ModelConfig) -> float:
        """The share of the plain model's KV bytes that it does without."""
        return 1 - self.kv_bytes(config) / slot_bytes(config, SharingPlan.none(config.n_layers))


def plan_of(rival: str) -> tuple[str | None, str]:
    """The plan that a --rival names, sa:PLAN, and what stands after its plus; None for a rival without one."""
    if not rival.startswith("sa:"):
        return None, rival.partition("+")[2]
    plan = rival.removeprefix("sa:")
    if plan.endswith(".json") or "+" not in plan:  # a path may hold a plus of its own
        return plan, ""
    plan, _, rest = plan.rpartition("+")
    return plan, rest


def parse_variants(
    plans: Sequence[str], rivals: Sequence[str], config: ModelConfig, entry: ModelEntry | None
) -> list[Variant]:
    """The plain model, then those of --sa and those of --rival. MinisaError for what the model cannot be."""
    none = SharingPlan.none(config.n_layers)
    variants = [Variant(PLAIN, None, none, Baseline())]
    for sa in plans:
        variants.append(Variant(sa, sa, choose_plan(sa, config, entry), Baseline()))
    for text in rivals:
        shared, rest = plan_of(text)
        if shared is not None:
            rival = Baseline.parse(rest, config.n_layers) if rest else Baseline()
            if rival.dropped or rival.borrowed:
                raise MinisaError(f"--rival {text}: only kv-int8 goes with a plan of attention sharing")
            variants.append(Variant(text, shared, choose_plan(shared, config, entry), rival))
        else:
            variants.append(Variant(text, None, none, Baseline.parse(text, config.n_layers)))
    names = [variant.name for variant in variants]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise MinisaError(f"{twice} is there twice: give each plan and rival once; plain is always the first")
    return variants


class Models:
    """Opens variants one after the other, one model in memory at a time; rivals without a plan share one.

    load: an LLM for what `sa` says.
    """

    def __init__(self, load: Callable[[str | None], LLM]) -> None:
        self._load = load
        self._llm: LLM | None = None
        self._sa: str | None = None

    def plain(self) -> LLM:
        return self._open(None)

    @contextmanager
    def opened(self, variant: Variant) -> Iterator[LLM]:
        llm = self._open(variant.sa)
        with altered(llm.model, variant.rival):
            yield llm

    def _open(self, sa: str | None) -> LLM:
        if self._llm is None or self._sa != sa:
            self._llm = None  # its memory first
            self._llm, self._sa = self._load(sa), sa
        return self._llm
