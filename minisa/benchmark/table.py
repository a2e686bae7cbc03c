"""The record of a run as a person reads it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Record = dict[str, Any]
MAX_SWING = 2.0  # how much the speed of single steps differs on a machine that is left alone


def heading(record: Record) -> str:
    """What is measured, on what; what the machine can do; what a decode step costs by formula."""
    model, run = record["model"], record["run"]
    size = f"{model['layers']} layers, {model['dim']} wide, {model['parameters'] / 1e6:,.1f} M parameters"
    quantize = f", weights {run['quantize']}" if run["quantize"] else ""
    kept = f", keys and values {run['kv_dtype']}" if run["kv_dtype"] != run["dtype"] else ""
    lines = [
        f"{model['name']}: {size}" + (", RANDOM WEIGHTS" if model["random_weights"] else ""),
        f"{run['dtype']}{quantize}{kept} on {run['device']} ({run['device_name']}), {run['threads']} threads, "
        f"batch {run['batch']}, torch {run['torch']}",
    ]
    rows = [["decode step by formula", "weights", "keys", "values", "shared rows", "total", "GFLOP", "tokens/s ≤"]]
    rows += [
        [
            f"  {cell['tokens']:,} in the cache, {cell['configuration']}",
            *map(megabytes, cell["bytes"].values()),
            number(cell["flops"] / 1e9, 2),
            number(cell["allowed_tokens_per_second"]),
        ]
        for cell in _own_decoding(record)
    ]
    return "\n".join([*lines, "", ceiling(record), "", layout(rows)])


def ceiling(record: Record) -> str:
    """What the machine can do, before and, if known already, after the measurements."""
    rows = [[f"ceiling, {record['run']['threads']} threads", "read bandwidth", "median", "matrix products", "median"]]
    for when in ("start", "end"):
        if found := record["ceiling"][when]:
            bandwidth = [f"{found['read_bandwidth'][kind] / 1e9:,.1f} GB/s" for kind in ("best", "median")]
            rate = [f"{found['matrix_rate'][kind] / 1e9:,.0f} GFLOP/s" for kind in ("best", "median")]
            rows.append([f"  at the {when}", *bandwidth, *rate])
    return layout(rows)


def results(record: Record) -> str:
    """A row for each configuration at each length, then one for each configuration; what else there is to say."""
    speeds = [["tokens/s", "median", "p10–p90", "of ceiling", "ratio", "p10–p90", "predicted"]]
    for cell in record["cells"]:
        name = cell["configuration"]
        label = f"{cell['kind']} {cell['tokens']:,}" if name == "plain" else ""
        share = "–" if cell["share"] is None else f"{cell['share']:.0%}"
        digits = 1 if cell["kind"] == "decode" else 0
        speed = _spread(cell["tokens_per_second"], digits)
        speeds.append([f"{label:<16} {name}", *speed, share, *_spread(cell["ratio"], 3), number(cell["predicted"], 3)])
    slots = f"KV of {record['run']['cache_slots']:,}"
    columns = ["load", "first token", "weights", "of plain's", slots, "of plain's", "peak memory", "added"]
    sizes = [["", *columns]]
    for it in record["configurations"]:
        ratios = [
            f"{found['ratio']:.3f}, predicted {found['predicted']:.3f}" if found else "–"
            for found in (it["weights_over_plain"], it["kv_over_plain"])
        ]
        seconds = [f"{number(it[key], 2)} s" for key in ("load_seconds", "first_token_seconds")]
        peak = [megabytes(it["peak_memory"]), megabytes(it["peak_memory"] - it["memory_before_load"])]
        weights, kept = megabytes(it["weight_bytes"]), megabytes(it["kv_bytes"])
        sizes.append([it["name"], *seconds, weights, ratios[0], kept, ratios[1], *peak])
    return "\n\n".join([ceiling(record), layout(speeds), layout(sizes), "\n".join(_notes(record))])


def _notes(record: Record) -> list[str]:
    notes = []
    run, configurations = record["run"], record["configurations"]
    for it in configurations:
        agreement = it["same_greedy_tokens"]
        followers = f", {it['followers']} of {record['model']['layers']} layers follow ({it['plan']})"
        same = f", {agreement} of {run['greedy_tokens']} greedy tokens like plain's"
        shared = followers if it["followers"] else ""
        notes.append(f"{it['name']}: {it['detail']}{shared}{same if agreement is not None else ''}")
        if it["kv_bytes"] != it["kv_bytes_by_formula"]:
            found, formula = it["kv_bytes"], it["kv_bytes_by_formula"]
            notes.append(f"MISMATCH: the KV cache of {it['name']} takes {found:,} bytes, the formula says {formula:,}")
    if all(it["name"] != "shared" for it in configurations):
        notes.append("plain attention only: --sa names the layers that follow")
    else:
        notes.append("ratio: shared over plain, predicted by bytes, for prefill by operations")
    if any(it["same_greedy_tokens"] is not None for it in configurations):
        notes.append("ratio of a peer: plain over the peer")
        if run["quantize"]:
            notes.append("the formats of the weights differ, so greedy tokens need not agree")
    own = [
        cell for cell in record["cells"] if cell["kind"] == "decode" and cell["configuration"] in ("plain", "shared")
    ]
    speeds = [cell["tokens_per_second"] for cell in own if cell["tokens_per_second"]]
    swing = max((speed["p90"] / speed["p10"] for speed in speeds), default=1.0)
    if swing > MAX_SWING:
        notes.append(
            f"DISTURBED: some speeds swung by {swing:.1f}×; something else runs here, measure again without it"
        )
    if record["interrupted"]:
        notes.append("interrupted: what is missing was not measured")
    return notes


def _own_decoding(record: Record) -> list[Record]:
    return [c for c in record["cells"] if c["kind"] == "decode" and c["configuration"] in ("plain", "shared")]


def layout(rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they need be; the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for label, *cells in rows:
        padded = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("  ".join([label.ljust(widths[0]), *padded]).rstrip())
    return "\n".join(lines)


def _spread(spread: Record | None, digits: int) -> list[str]:
    if spread is None:
        return ["–", "–"]
    return [number(spread["median"], digits), f"{number(spread['p10'], digits)}–{number(spread['p90'], digits)}"]


def number(value: float | None, digits: int = 0) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def megabytes(n_bytes: float | None) -> str:
    return "–" if n_bytes is None else f"{n_bytes / 1e6:,.1f} MB"
