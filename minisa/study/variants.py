"""What one evaluation compares: the plain model, plans of attention sharing, and baselines."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from minisa.config import ModelConfig
from minisa.engine import LLM
from minisa.errors import MinisaError
from minisa.models.registry import ModelEntry, choose_plan
from minisa.sharing import SharingPlan
from minisa.study.baselines import Baseline, altered, slot_bytes

PLAIN = "plain"


@dataclass(frozen=True, slots=True)
class Variant:
    """A model with a plan, a baseline's changes, or neither.

    name: as it was given. sa: what `minisa.load` takes for the plan.
    """

    name: str
    sa: str | None
    plan: SharingPlan
    baseline: Baseline

    @property
    def kind(self) -> str:
        """For people and plots: plain, sa, drop, cla or kv-int8, or two of them with a plus."""
        base = self.baseline
        kinds = {"sa": self.plan.followers, "drop": base.dropped, "cla": base.borrowed, "kv-int8": base.int8}
        return "+".join(kind for kind, present in kinds.items() if present) or PLAIN

    def kv_bytes(self, config: ModelConfig) -> int:
        """Bytes a token takes in the KV cache in bf16, or with what the baseline makes of it."""
        return slot_bytes(config, self.plan, self.baseline)

    def saved(self, config: ModelConfig) -> float:
        """The share of the plain model's KV bytes that it does without."""
        return 1 - self.kv_bytes(config) / slot_bytes(config, SharingPlan.none(config.n_layers))


def parse_variants(
    plans: Sequence[str], baselines: Sequence[str], config: ModelConfig, entry: ModelEntry | None
) -> list[Variant]:
    """The plain model, then those of --sa and those of --baseline. Raises MinisaError for what the model cannot be."""
    none = SharingPlan.none(config.n_layers)
    variants = [Variant(PLAIN, None, none, Baseline())]
    variants += [Variant(sa, sa, choose_plan(sa, config, entry), Baseline()) for sa in plans]
    for text in baselines:
        if text.startswith("sa:"):
            sa = text.removeprefix("sa:").removesuffix("+kv-int8")
            baseline = Baseline(int8=text.endswith("+kv-int8"))
            variants.append(Variant(text, sa, choose_plan(sa, config, entry), baseline))
        else:
            variants.append(Variant(text, None, none, Baseline.parse(text, config.n_layers)))
    names = [variant.name for variant in variants]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise MinisaError(f"{twice} is there twice: give each plan and baseline once; plain is always the first")
    return variants


def opened(variants: Sequence[Variant], load: Callable[[str | None], LLM]) -> Iterator[tuple[Variant, LLM]]:
    """Each variant with its model, plain first, one model in memory at a time if the caller keeps none.

    load: an LLM for what `sa` says; variants of one `sa` share it.
    """
    by_plan = sorted(variants, key=lambda variant: variant.sa or "")
    for sa, group in groupby(by_plan, key=lambda variant: variant.sa):
        llm = load(sa)
        for variant in group:
            with altered(llm.model, variant.baseline):
                yield variant, llm
        del llm  # before the next is loaded
