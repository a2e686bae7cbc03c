"""What an evaluation found: one record, printed as tables, written as JSON, drawn as quality against bytes saved."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minisa.benchmark.plot import save
from minisa.config import ModelConfig
from minisa.study.compare import Pair, paired_difference, ratio
from minisa.study.variants import Variant

Record = dict[str, Any]
Scores = Mapping[str, Mapping[str, Sequence[Pair]]]  # benchmark → metric → one pair for each item

EXPONENTIAL = ("perplexity",)  # metrics that are exp of a mean; they are compared by their ratio


def summarize(
    settings: Record, config: ModelConfig, variants: Sequence[Variant], scores: Mapping[str, Scores]
) -> Record:
    """The settings, the items of each benchmark, and for each variant the bytes it saves and its metrics.

    scores: those of each variant's name, on the same items in the same order. A metric's record has its "value", and
    how that differs from the first variant's as "difference", or "ratio" for a perplexity; each with a standard error,
    which for the latter two is that of the paired differences. null is unknown.
    """
    plain = scores[variants[0].name]
    items = {name: len(next(iter(metrics.values()))) for name, metrics in plain.items()}
    rows = [
        {
            "variant": variant.name,
            "kind": variant.kind,
            "plan": str(variant.plan),
            "kv_bytes_per_token": variant.kv_bytes(config),
            "kv_saved": variant.saved(config),
            "benchmarks": {
                name: {metric: _metric(metric, pairs, plain[name][metric]) for metric, pairs in metrics.items()}
                for name, metrics in scores[variant.name].items()
            },
        }
        for variant in variants
    ]
    return {"settings": settings, "items": items, "variants": rows}


def _metric(metric: str, mine: Sequence[Pair], reference: Sequence[Pair]) -> Record:
    value, difference = ratio(mine), paired_difference(mine, reference)
    named = {"value": value, "difference": difference}
    if metric in EXPONENTIAL:
        named = {"value": value.exp(), "ratio": difference.exp()}
    record: Record = {}
    for name, estimate in named.items():
        for key, number in ((name, estimate.value), (f"{name}_stderr", estimate.stderr)):
            record[key] = number if math.isfinite(number) else None  # JSON has no other numbers
    return record


def table(summary: Record, benchmark: str) -> str:
    """One line a variant: bytes saved, each metric, and its paired difference from (or ratio to) the first variant."""
    lines = [["", "KV saved"]]
    for metric in summary["variants"][0]["benchmarks"][benchmark]:
        lines[0] += [metric, "× plain" if metric in EXPONENTIAL else "− plain"]
    for row in summary["variants"]:
        lines.append([row["variant"], f"{row['kv_saved']:.1%}"])
        for metric, found in row["benchmarks"][benchmark].items():
            compared = ("ratio", ".3f") if metric in EXPONENTIAL else ("difference", "+.3f")
            lines[-1] += [_with_error(found, "value", ".3f"), _with_error(found, *compared) if len(lines) > 2 else ""]
    first, *others = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        f"{line[0]:<{first}}" + "".join(f"  {cell:>{width}}" for cell, width in zip(line[1:], others, strict=True))
        for line in lines
    )


def _with_error(found: Record, name: str, form: str) -> str:
    value, error = found[name], found[f"{name}_stderr"]
    if value is None:
        return "unknown"
    return format(value, form) + ("" if error is None else f" ± {error:.3f}")


def plot(summary: Record, path: str) -> None:
    """Write a PNG: each benchmark's main metric against the share of the KV cache saved, a line for each kind.

    Bars are standard errors, of the ratio to plain for a perplexity.
    Raises MinisaError where the file cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8 * len(summary["items"]), 5), layout="constrained")
    panels = figure.subplots(1, len(summary["items"]), squeeze=False)[0]
    for axes, (benchmark, items) in zip(panels, summary["items"].items(), strict=True):
        metrics = summary["variants"][0]["benchmarks"][benchmark]
        metric = "acc_norm" if "acc_norm" in metrics else next(iter(metrics))
        name = "ratio" if metric in EXPONENTIAL else "value"
        points: dict[str, list[tuple[float, float, float]]] = {}  # kind → saved, value, its error
        for row in summary["variants"]:
            found = row["benchmarks"][benchmark][metric]
            if found[name] is not None:
                point = (100 * row["kv_saved"], found[name], found[f"{name}_stderr"] or 0.0)
                points.setdefault(row["kind"], []).append(point)
                if row["kind"] == "sa":  # the others' layers say little; a plan's name says which it is
                    label = Path(row["variant"]).stem[:28]
                    axes.annotate(label, point[:2], xytext=(6, 4), textcoords="offset points", fontsize=7)
        for kind, found in points.items():
            axes.errorbar(*zip(*sorted(found), strict=True), marker="o", capsize=3, label=kind)
        axes.set_title(f"{summary['settings']['model']}: {benchmark}, {items} items")
        axes.set(xlabel="KV cache saved, %", ylabel=f"{metric}, ratio to plain" if name == "ratio" else metric)
        axes.grid(alpha=0.3)
        axes.legend()
    save(figure, path)
