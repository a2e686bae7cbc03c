"""What an evaluation found: one record, printed as tables, written as JSON, drawn as quality against bytes saved."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minisa.benchmark.plot import check_matplotlib, save
from minisa.config import ModelConfig
from minisa.errors import MinisaError
from minisa.study.compare import Estimate, Pair, paired_difference, ratio
from minisa.study.variants import Variant

Record = dict[str, Any]
Scores = Mapping[str, Mapping[str, list[Pair]]]  # benchmark → metric → one pair for each item

EXPONENTIAL = ("perplexity",)  # metrics that are exp of a mean; they are compared by their ratio
COLOURS = {"plain": "black", "sa": "C0", "drop": "C1", "cla": "C2", "kv-int8": "C3"}


def summarize(settings: Record, config: ModelConfig, variants: Sequence[Variant], scores: Sequence[Scores]) -> Record:
    """The settings, and for each variant the bytes it saves and every benchmark's metrics with standard errors.

    scores: each variant's, of the same items in the same order. Beside a metric stands how it differs from the first
    variant's: "difference", or "ratio" for a perplexity, with the standard error of the paired differences. null is
    unknown.
    """
    rows = []
    for variant, mine in zip(variants, scores, strict=True):
        benchmarks = {
            name: {
                "items": len(next(iter(metrics.values()))),
                "metrics": {
                    metric: _metric(metric, pairs, scores[0][name][metric]) for metric, pairs in metrics.items()
                },
            }
            for name, metrics in mine.items()
        }
        rows.append(
            {
                "variant": variant.name,
                "kind": variant.kind,
                "plan": str(variant.plan),
                "kv_bytes_per_token": variant.kv_bytes(config),
                "kv_saved": variant.saved(config),
                "benchmarks": benchmarks,
            }
        )
    return {"settings": settings, "variants": rows}


def _metric(metric: str, mine: Sequence[Pair], reference: Sequence[Pair]) -> Record:
    value, difference = ratio(mine), paired_difference(mine, reference)
    if metric in EXPONENTIAL:
        return _named("value", value.exp()) | _named("ratio", difference.exp())
    return _named("value", value) | _named("difference", difference)


def _named(name: str, estimate: Estimate) -> Record:
    return {name: finite(estimate.value), f"{name}_stderr": finite(estimate.stderr)}


def finite(value: float) -> float | None:
    """None for what JSON has no number for."""
    return value if math.isfinite(value) else None


def table(summary: Record, benchmark: str) -> str:
    """One line a variant: bytes saved, each metric, and its paired difference from (or ratio to) the first variant."""
    lines = [["", "KV saved"]]
    for metric in summary["variants"][0]["benchmarks"][benchmark]["metrics"]:
        lines[0] += [metric, "× plain" if metric in EXPONENTIAL else "− plain"]
    for number, row in enumerate(summary["variants"]):
        line = [row["variant"], f"{row['kv_saved']:.1%}"]
        for metric, found in row["benchmarks"][benchmark]["metrics"].items():
            if metric in EXPONENTIAL:
                value, compared = _with_error(found, "value", ".2f"), _with_error(found, "ratio", ".3f")
            else:
                value, compared = _with_error(found, "value", ".3f"), _with_error(found, "difference", "+.3f")
            line += [value, compared if number else ""]
        lines.append(line)
    first, *others = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        f"{line[0]:<{first}}" + "".join(f"  {cell:>{width}}" for cell, width in zip(line[1:], others, strict=True))
        for line in lines
    )


def _with_error(found: Record, name: str, form: str) -> str:
    value, error = found[name], found[f"{name}_stderr"]
    if value is None:
        return "unknown"
    return format(value, form) + ("" if error is None else f" ± {format(error, form.removeprefix('+'))}")


def plot(summary: Record, path: str) -> None:
    """Write a PNG: each benchmark's first metric against the share of the KV cache saved, a colour for each kind.

    Bars are standard errors, of the ratio to plain for a perplexity; a line joins the best of a kind at each share.
    Raises MinisaError where matplotlib is missing, nothing is known or the file cannot be written.
    """
    check_matplotlib()
    from matplotlib.figure import Figure

    benchmarks = list(summary["variants"][0]["benchmarks"])
    figure = Figure(figsize=(8 * len(benchmarks), 5), layout="constrained")
    for axes, benchmark in zip(figure.subplots(1, len(benchmarks), squeeze=False)[0], benchmarks, strict=True):
        _draw(axes, summary, benchmark)
    save(figure, path)


def _draw(axes: Any, summary: Record, benchmark: str) -> None:
    from matplotlib.ticker import MaxNLocator, NullLocator

    found = {row["variant"]: row["benchmarks"][benchmark] for row in summary["variants"]}
    metric = next(iter(found["plain"]["metrics"]))
    name, best = ("ratio", min) if metric in EXPONENTIAL else ("value", max)
    known: dict[str, list[tuple[float, float, float, str]]] = {}  # kind → saved, value, its error, variant
    for row in summary["variants"]:
        measured = found[row["variant"]]["metrics"][metric]
        if measured[name] is not None:
            point = (100 * row["kv_saved"], measured[name], measured[f"{name}_stderr"] or 0.0, row["variant"])
            known.setdefault(row["kind"], []).append(point)
    if not known:
        raise MinisaError(f"--plot: there is nothing to draw, {benchmark}'s {metric} is unknown for every variant")
    for number, (kind, points) in enumerate(known.items()):
        colour = COLOURS.get(kind, f"C{4 + number}")
        saved, values, errors, names = zip(*points, strict=True)
        axes.errorbar(saved, values, errors, marker="o", linestyle="none", capsize=3, label=kind, color=colour)
        curve = {x: best(value for other, value, *_ in points if other == x) for x in sorted(saved)}
        axes.plot(list(curve), list(curve.values()), color=colour, alpha=0.5)
        for x, y, variant in zip(saved, values, names, strict=True):
            if kind == "sa":  # the others' layers say little; a plan's name says which it is
                label = Path(variant).stem[:28]
                axes.annotate(label, (x, y), xytext=(6, 4), textcoords="offset points", fontsize=7)
    if name == "ratio":
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(MaxNLocator(10))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter("{x:.2f}")
    if "plain" in known:
        axes.axhline(known["plain"][0][1], color="black", linewidth=0.8, alpha=0.5)
    axes.set(
        xlabel="KV cache saved, %",
        ylabel=f"{metric}, ratio to plain" if name == "ratio" else metric,
        title=f"{summary['settings']['model']}: {benchmark}, {found['plain']['items']} items",
    )
    axes.grid(alpha=0.3)
    axes.legend()
