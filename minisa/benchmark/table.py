"""The record of a run as a person reads it: heading, ceiling, costs, results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from minisa.benchmark.report import Record

GAP = "  "
STEADY = 2.0  # how much the speed of single steps may differ on a machine that is left alone


def heading(record: Record) -> str:
    """What is measured, on what."""
    model, run = record["model"], record["run"]
    lines = [
        f"{model['name']}: {model['layers']} layers, {model['dim']} wide, {model['parameters'] / 1e6:,.1f} M parameters"
    ]
    if model["random_weights"]:
        lines.append("RANDOM WEIGHTS: the shape alone is the model's; nothing here is about the quality of its text")
    quantize = f", weights {run['quantize']}" if run["quantize"] else ""
    if run["kv_dtype"] != run["dtype"]:
        quantize += f", keys and values {run['kv_dtype']}"
    lines.append(
        f"{run['dtype']}{quantize} on {run['device']} ({run['device_name']}), {run['threads']} threads, "
        f"batch {run['batch']}, torch {run['torch']}"
    )
    return "\n".join(lines)


def ceiling(record: Record) -> str:
    """What the machine could do before and, if known already, after the measurements."""
    bandwidth, matrix, run = record["ceiling"]["read_bandwidth"], record["ceiling"]["matrix_rate"], record["run"]
    rows = [[f"ceiling, {run['threads']} threads", "read bandwidth", "median", "matrix products", "median"]]
    for when in ("start", "end"):
        if bandwidth[when] is not None:
            rows.append(
                [
                    f"  at the {when}",
                    *(f"{bandwidth[when][kind] / 1e9:,.1f} GB/s" for kind in ("best", "median")),
                    *(f"{matrix[when][kind] / 1e9:,.0f} GFLOP/s" for kind in ("best", "median")),
                ]
            )
    return "\n" + _layout(rows)


def costs(record: Record) -> str:
    """Bytes and operations of one decode step by formula, and the speed that the ceiling allows."""
    batch = record["run"]["batch"]
    rows = []
    for configuration in _own(record):
        for decode in configuration["decode"]:
            parts = decode["bytes"]
            rows.append(
                [
                    f"  {configuration['name']}, context {decode['context']:,}",
                    *(megabytes(parts[part]) for part in ("weights", "keys", "values", "shared_rows", "total")),
                    f"{decode['flops'] / 1e9:,.2f}",
                    _number(decode["allowed_tokens_per_second"]),
                ]
            )
    title = "a decode step by formula" + (f", {batch} rows" if batch > 1 else "")
    columns = ["weights", "keys", "values", "shared rows", "total", "GFLOP", "tokens/s ≤"]
    return "\n" + _layout([[title, *columns], *rows])


def results(record: Record) -> str:
    """One column for each configuration, the ratios beside them."""
    configurations = record["configurations"]
    if not configurations:
        return ""
    table = _Table(record)
    first = configurations[0]
    table.add("load, s", lambda c: _number(c["load_seconds"], 2))
    table.add(
        f"first token after loading ({first['prompt_tokens']}), s",
        lambda c: _number(c["first_token_seconds"], 2),
    )
    for i, prefill in enumerate(first["prefill"]):
        table.add(f"prefill of {prefill['tokens']:,}, tokens/s", _speed("prefill", i), ("prefill", i))
    for i, decode in enumerate(first["decode"]):
        table.add(f"decode at {decode['context']:,}, tokens/s", _speed("decode", i), ("decode", i))
        table.add("  10th to 90th percentile", _range("decode", i))
        table.add("  share of the read bandwidth", _share(i))
    table.add(f"KV cache of {record['run']['cache_slots']:,} slots", lambda c: megabytes(c["kv_bytes"]), ("kv_bytes",))
    table.add("  by formula", _formula)
    table.add("weights as stored", lambda c: megabytes(c["weight_bytes"]), ("weight_bytes",))
    table.add("peak memory", lambda c: megabytes(c["peak_memory"]))
    table.add("  over what it had before loading", _added_memory)
    if record["plain_over_peers"]:
        table.add_agreement()
    return "\n" + table.text() + _notes(record)


def _notes(record: Record) -> str:
    notes = []
    for configuration in record["configurations"]:
        if configuration["kv_bytes_match"] is False:
            notes.append(
                f"MISMATCH: the KV cache of {configuration['name']} takes {configuration['kv_bytes']:,} bytes, "
                f"the formula says {configuration['kv_bytes_by_formula']:,}"
            )
    if record["shared_over_plain"]:
        shared = next(c for c in record["configurations"] if c["name"] == "shared")
        notes.append(
            f"shared: {shared['followers']} of {record['model']['layers']} layers follow ({shared['plan']})\n"
            "ratio: shared over plain, for speeds the median over rounds; predicted by bytes, for prefill by operations"
        )
    else:
        notes.append("plain attention only: --sa names the layers that follow")
    for configuration in record["configurations"]:
        if configuration["detail"]:
            chosen = "".join(f"; {what}: {way}" for what, way in configuration["chosen"].items())
            notes.append(f"{configuration['name']}: {configuration['detail']}{chosen}")
    swing = _swing(record)
    if swing > STEADY:
        notes.append(
            f"DISTURBED: some speeds swung by {swing:.1f}×; something else runs here, measure again without it"
        )
    if record["run"]["quantize"] and record["plain_over_peers"]:
        notes.append("the formats of the weights differ, so greedy tokens need not agree")
    if record["interrupted"]:
        notes.append("interrupted: what is missing was not measured")
    return "\n\n" + "\n".join(notes)


def _swing(record: Record) -> float:
    """The widest 10th to 90th percentile of our own decoding, as a ratio."""
    speeds = [decode["tokens_per_second"] for c in _own(record) for decode in c["decode"]]
    return max((speed["p90"] / speed["p10"] for speed in speeds if speed), default=1.0)


class _Table:
    """Rows of a label, a cell for each configuration, and the ratios that belong to them."""

    def __init__(self, record: Record) -> None:
        self._record = record
        self._columns: list[tuple[str, Callable[[str, Any, tuple[Any, ...]], str]]] = []
        self._configurations = {c["name"]: c for c in record["configurations"]}
        self._peers = {peer["name"]: peer for peer in record["plain_over_peers"]}
        header = [""]
        for name in self._configurations:
            header.append(name)
            if name == "shared":
                header += ["ratio", "predicted"]
            elif name in self._peers:
                header.append("plain ÷ it")
        self._rows = [header]

    def add(self, label: str, cell: Callable[[Record], str], ratio: tuple[Any, ...] = ()) -> None:
        """ratio: the keys under which shared_over_plain and plain_over_peers hold this row's."""
        row = [label]
        for name, configuration in self._configurations.items():
            row.append(cell(configuration))
            if name == "shared":
                found = _at(self._record["shared_over_plain"], ratio)
                row += [_number(found.get("ratio"), 3), _number(found.get("predicted"), 3)]
            elif name in self._peers:
                row.append(_number(_at(self._peers[name], ratio).get("ratio"), 2))
        self._rows.append(row)

    def add_agreement(self) -> None:
        total = next(iter(self._peers.values()))["greedy_tokens"]
        self.add(
            f"greedy tokens like plain's, of {total}",
            lambda c: _number(self._peers.get(c["name"], {}).get("same_greedy_tokens")),
        )

    def text(self) -> str:
        return _layout(self._rows)


def _at(tree: Any, keys: tuple[Any, ...]) -> Record:
    if not keys:
        return {}
    for key in keys:
        if isinstance(tree, dict) and key not in tree:
            return {}
        tree = tree[key]
    return tree


def _speed(kind: str, i: int) -> Callable[[Record], str]:
    def cell(configuration: Record) -> str:
        speed = configuration[kind][i]["tokens_per_second"]
        return _number(speed and speed["median"], 1 if kind == "decode" else 0)

    return cell


def _range(kind: str, i: int) -> Callable[[Record], str]:
    def cell(configuration: Record) -> str:
        speed = configuration[kind][i]["tokens_per_second"]
        return f"{_number(speed['p10'], 1)}–{_number(speed['p90'], 1)}" if speed else "–"

    return cell


def _share(i: int) -> Callable[[Record], str]:
    def cell(configuration: Record) -> str:
        share = configuration["decode"][i]["share_of_bandwidth"]
        return "–" if share is None else f"{share:.0%}"

    return cell


def _formula(configuration: Record) -> str:
    match = configuration["kv_bytes_match"]
    if match is None:
        return "–"
    return "the same" if match else f"{megabytes(configuration['kv_bytes_by_formula'])} (!)"


def _added_memory(configuration: Record) -> str:
    peak = configuration["peak_memory"]
    return "–" if peak is None else megabytes(peak - configuration["memory_before_load"])


def _own(record: Record) -> list[Record]:
    peers = {peer["name"] for peer in record["plain_over_peers"]}
    return [configuration for configuration in record["configurations"] if configuration["name"] not in peers]


def _layout(rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they need be; the first to the left, the others to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = []
    for label, *cells in rows:
        line = label.ljust(widths[0])
        for width, cell in zip(widths[1:], cells, strict=True):
            line += GAP + cell.rjust(width)
        lines.append(line.rstrip())
    return "\n".join(lines)


def _number(number: float | None, digits: int = 0) -> str:
    return "–" if number is None else f"{number:,.{digits}f}"


def megabytes(n_bytes: float | None) -> str:
    return "–" if n_bytes is None else f"{n_bytes / 1e6:,.1f} MB"
