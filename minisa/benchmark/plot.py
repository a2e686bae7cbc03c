"""bench.py --plot: speed and memory against context length, from the record of a run. And how any plot is saved."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from minisa.errors import MinisaError
from minisa.files import written_whole

Record = dict[str, Any]


def check_matplotlib() -> None:
    """Raises MinisaError where it is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise MinisaError('--plot: needs matplotlib; pip install "minisa[plots]"')


def save(figure: Any, path: str, dpi: int = 150) -> None:
    """Write a figure as a PNG, whatever the file's name. A "$" in its texts is a dollar, not mathematics.

    The file has its name only once it is whole. MinisaError where it cannot be written.
    """
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_parse_math(False)
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
    run, slots = record["run"], record["run"]["cache_slots"]
    for i, it in enumerate(record["configurations"]):
        name, colour = it["name"], f"C{i}"
        cells = [c for c in record["cells"] if (c["configuration"], c["kind"]) == (name, "decode") and c["share"]]
        contexts = [cell["tokens"] for cell in cells]
        speeds = [cell["tokens_per_second"] for cell in cells]
        speed.plot(contexts, [s["median"] for s in speeds], marker="o", color=colour, label=name)
        speed.fill_between(contexts, [s["p10"] for s in speeds], [s["p90"] for s in speeds], color=colour, alpha=0.15)
        if it["kv_bytes"] is None:  # a peer, of which only the speed is comparable
            continue
        ceiling = [cell["tokens_per_second"]["median"] / cell["share"] for cell in cells]
        speed.plot(contexts, ceiling, linestyle="--", color=colour, label=f"ceiling of {name}")
        weights, per_slot = it["weight_bytes"] / 1e6, it["kv_bytes"] / slots / 1e6
        total = [weights + per_slot * context for context in contexts]
        memory.plot(contexts, total, marker="o", color=colour, label=f"weights and KV cache, {name}")
        memory.plot(contexts, [weights] * len(contexts), linestyle=":", color=colour, label=f"weights, {name}")
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
