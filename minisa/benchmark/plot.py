"""bench.py --plot: speed and memory against context length, from the record of a run."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from minisa.benchmark.report import Record
from minisa.errors import MinisaError
from minisa.files import written_whole


def check_matplotlib() -> None:
    """Raises MinisaError where it is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise MinisaError('--plot: needs matplotlib; pip install "minisa[plots]"')


def save(figure: Any, path: str, dpi: int = 150) -> None:
    """Write a figure as a PNG whatever its name, a "$" in its texts standing for itself, what cannot be drawn for "?".

    The file has its name only once it is whole. MinisaError where it cannot be written.
    """
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_parse_math(False)
        text.set_text("".join(c if c.isprintable() or c == "\n" else "?" for c in text.get_text()))
    try:
        with written_whole(Path(path)) as partial:
            figure.savefig(partial, format="png", dpi=dpi)
    except OSError as error:
        raise MinisaError(f"--plot {path}: {error.strerror}") from error


def plot(record: Record, path: str) -> None:
    """Write a PNG. Left: decode tokens/s with its 10th to 90th percentile, and what the bandwidth read in the same
    rounds would allow. Right: memory of weights and of the cache in use. One colour for each configuration.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    speed, memory = figure.subplots(1, 2)
    peers = {peer["name"] for peer in record["plain_over_peers"]}
    for i, configuration in enumerate(record["configurations"]):
        _draw_speed(speed, configuration, f"C{i}")
        if configuration["name"] not in peers:
            _draw_memory(memory, configuration, f"C{i}", record["run"]["cache_slots"])
    run = record["run"]
    random = ", random weights" if record["model"]["random_weights"] else ""
    figure.suptitle(
        f"{record['model']['name']}{random}: {run['quantize'] or run['dtype']} on {run['device_name']}, "
        f"{run['threads']} threads, batch {run['batch']}"
    )
    speed.set(xlabel="context, tokens", ylabel="decode, tokens/s", ylim=(0, None))
    memory.set(xlabel="context, tokens", ylabel="memory, MB", ylim=(0, None))
    for axes in (speed, memory):
        axes.grid(alpha=0.3)
        axes.legend()
    save(figure, path)


def _draw_speed(axes: Any, configuration: Record, colour: str) -> None:
    measured = [decode for decode in configuration["decode"] if decode["share_of_bandwidth"]]
    contexts = [decode["context"] for decode in measured]
    speeds = [decode["tokens_per_second"] for decode in measured]
    axes.plot(contexts, [s["median"] for s in speeds], marker="o", color=colour, label=configuration["name"])
    axes.fill_between(contexts, [s["p10"] for s in speeds], [s["p90"] for s in speeds], color=colour, alpha=0.15)
    if configuration["kv_bytes"] is not None:
        ceiling = [s["median"] / d["share_of_bandwidth"] for s, d in zip(speeds, measured, strict=True)]
        axes.plot(contexts, ceiling, linestyle="--", color=colour, label=f"ceiling of {configuration['name']}")


def _draw_memory(axes: Any, configuration: Record, colour: str, slots: int) -> None:
    contexts = [decode["context"] for decode in configuration["decode"]]
    weights, per_slot = configuration["weight_bytes"], configuration["kv_bytes"] / slots
    name = configuration["name"]
    total = [(weights + per_slot * context) / 1e6 for context in contexts]
    axes.plot(contexts, total, marker="o", color=colour, label=f"weights and KV cache, {name}")
    axes.plot(contexts, [weights / 1e6] * len(contexts), linestyle=":", color=colour, label=f"weights, {name}")
