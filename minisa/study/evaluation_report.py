"""What an evaluation found: one record, printed as a table, written as JSON, drawn as quality against bytes saved."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minisa.benchmark.plot import check_matplotlib, save
from minisa.config import ModelConfig
from minisa.errors import MinisaError
from minisa.study.compare import Estimate, paired_difference, ratio
from minisa.study.results import Record
from minisa.study.variants import Variant

EXPONENTIAL = ("perplexity",)  # metrics that are exp of a mean; they are compared by their ratio
COLOURS = {"plain": "black", "sa": "C0", "drop": "C1", "cla": "C2", "kv-int8": "C3"}


def summarize(
    settings: Record,
    metrics: Sequence[str],
    config: ModelConfig,
    variants: Sequence[Variant],
    records: Mapping[str, Mapping[int, Record]],
) -> Record:
    """The settings, the number of items, and for each variant its metrics with standard errors.

    Only items that every variant has answered count. Beside a metric stands what differs from the first variant:
    "difference", or "ratio" for a perplexity, with the standard error of the paired differences. null is unknown.
    """
    items = sorted(set.intersection(*(set(records[variant.name]) for variant in variants)))
    rows = []
    for variant in variants:
        measured = {
            metric: _metric(
                metric, *(_pairs(records[name], items, metric) for name in (variant.name, variants[0].name))
            )
            for metric in metrics
        }
        rows.append(
            {
                "variant": variant.name,
                "kind": variant.kind,
                "plan": str(variant.plan),
                "kv_bytes_per_token": variant.kv_bytes(config),
                "kv_saved": variant.saved(config),
                "metrics": measured,
            }
        )
    return {"settings": settings, "items": len(items), "variants": rows}


def _pairs(records: Mapping[int, Record], items: Sequence[int], metric: str) -> list[tuple[float, float]]:
    return [tuple(records[item]["scores"][metric]) for item in items]


def _metric(metric: str, mine: list[tuple[float, float]], reference: list[tuple[float, float]]) -> Record:
    value, difference = ratio(mine), paired_difference(mine, reference)
    if metric in EXPONENTIAL:
        return _named("value", value.exp()) | _named("ratio", difference.exp())
    return _named("value", value) | _named("difference", difference)


def _named(name: str, estimate: Estimate) -> Record:
    return {name: finite(estimate.value), f"{name}_stderr": finite(estimate.stderr)}


def finite(value: float) -> float | None:
    """None for what JSON has no number for."""
    return value if math.isfinite(value) else None


def table(summary: Record) -> str:
    """One line a variant: bytes saved, each metric, and its paired difference from (or ratio to) the first variant."""
    plain, *_ = rows = summary["variants"]
    lines = [["", "KV saved"]]
    for metric in plain["metrics"]:
        lines[0] += [metric, "× plain" if metric in EXPONENTIAL else "− plain"]
    for row in rows:
        line = [row["variant"], f"{row['kv_saved']:.1%}"]
        for metric, found in row["metrics"].items():
            if metric in EXPONENTIAL:
                value, compared = _with_error(found, "value", ".2f"), _with_error(found, "ratio", ".3f")
            else:
                value, compared = _with_error(found, "value", ".3f"), _with_error(found, "difference", "+.3f")
            line += [value, "" if row is plain else compared]
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
    """Write a PNG: the first metric against the share of the KV cache saved, one colour for each kind of variant.

    Bars are standard errors, of the ratio to plain for a perplexity; a line joins the best of a kind at each share.
    MinisaError where matplotlib is missing, nothing is known or the file cannot be written.
    """
    check_matplotlib()
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, NullLocator

    metric = next(iter(summary["variants"][0]["metrics"]))
    name, best = ("ratio", min) if metric in EXPONENTIAL else ("value", max)
    rows = [row for row in summary["variants"] if row["metrics"][metric][name] is not None]
    if not rows:
        raise MinisaError(f"--plot {path}: there is nothing to draw, {metric} is unknown for every variant")
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes: Any = figure.subplots()
    by_kind: dict[str, list[Record]] = {}
    for row in rows:
        by_kind.setdefault(row["kind"], []).append(row)
    for number, (kind, members) in enumerate(by_kind.items()):
        colour = COLOURS.get(kind, f"C{4 + number}")
        saved = [100 * row["kv_saved"] for row in members]
        values = [row["metrics"][metric][name] for row in members]
        errors = [row["metrics"][metric][f"{name}_stderr"] or 0.0 for row in members]
        axes.errorbar(saved, values, errors, marker="o", linestyle="none", capsize=3, label=kind, color=colour)
        curve = {x: best(y for other, y in zip(saved, values, strict=True) if other == x) for x in sorted(saved)}
        axes.plot(list(curve), list(curve.values()), color=colour, alpha=0.5)
        for row, x, y in zip(members, saved, values, strict=True):
            if kind == "sa":  # the others' layers say little; a plan's name says which it is
                label = Path(row["variant"]).stem[:28]
                axes.annotate(label, (x, y), xytext=(6, 4), textcoords="offset points", fontsize=7)
    if metric in EXPONENTIAL:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(MaxNLocator(10))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter("{x:.2f}")
    axes.axhline(rows[0]["metrics"][metric][name], color="black", linewidth=0.8, alpha=0.5)
    settings = summary["settings"]
    axes.set(
        xlabel="KV cache saved, %",
        ylabel=f"{metric}, ratio to plain" if name == "ratio" else metric,
        title=f"{settings['model']}: {settings['task']}, {summary['items']} items",
    )
    axes.grid(alpha=0.3)
    axes.legend()
    save(figure, path)
