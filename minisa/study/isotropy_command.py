"""python -m minisa isotropy: which layers attend alike, as a table, as JSON and as heatmaps."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import click

from minisa.console import OutputFile, open_model, weights_options, write_json
from minisa.study.options import LENGTH

if TYPE_CHECKING:
    from torch import Tensor

    from minisa.study.isotropy import Similarity

MEASURES = ("pooled", "same_head", "best_head", "js")
PARTS = {"with_sink": "whole", "without_sink": "first token left out"}


@click.command()
@weights_options
@click.option("--text", required=True, metavar="FILE", help="UTF-8 text to look at.")
@LENGTH
@click.option("--limit", type=click.IntRange(1), default=8, show_default=True, help="At most so many windows.")
@click.option("--json", "json_file", type=OutputFile(), metavar="FILE.json", help="Write every matrix there.")
@click.option("--plot", "plot_file", type=OutputFile(), metavar="FILE.png", help="Draw the matrices.")
def isotropy(
    model: str, text: str, length: int, limit: int, json_file: str | None, plot_file: str | None, **load: Any
) -> None:
    """Measure how alike the attention of a model's layers is: for each layer, the earlier one most like it.

    pooled: cosine, heads averaged. same head, best head: cosine head by head. js: Jensen-Shannon divergence of each
    head from the one it is most like, in bits. Each with the first token's column (the "sink") and without. Layers
    that look alike are not always those that can share.
    """
    from minisa.benchmark.plot import check_matplotlib
    from minisa.study.isotropy import similarity
    from minisa.study.plans import text_settings
    from minisa.study.progress import Progress
    from minisa.study.text import windows

    if plot_file is not None:
        check_matplotlib()
    llm = open_model(model, max_seq_len=1, compile=False, **load)
    cut = windows(llm, text, length, limit)
    bar = Progress("isotropy", len(cut))
    found = dict(zip(PARTS, similarity(llm.model, cut, bar.update), strict=True))
    bar.close()
    settings = text_settings(llm, model, text, cut, load["quantize"])
    title = f"{settings['model']} · {len(cut)} windows of {length} tokens · {settings['dtype']}"
    click.echo(title)
    click.echo(table(found))
    if json_file is not None:
        matrices = {part: {name: _rows(getattr(similar, name)) for name in MEASURES} for part, similar in found.items()}
        write_json(json_file, {"settings": settings, **matrices})
    if plot_file is not None:
        plot(title, found, plot_file)


def _rows(matrix: Tensor) -> list[list[float | None]]:
    """[leader][follower]; None for what is not defined."""
    return [[round(x, 6) if math.isfinite(x) else None for x in row] for row in matrix.tolist()]


def table(found: dict[str, Similarity]) -> str:
    """For each layer the earlier one it is most like, by each measure."""
    title = "".join(f"  {PARTS[part]:<{12 * len(MEASURES) - 2}}" for part in found)
    names = "".join(f"  {name.replace('_', ' '):<10}" for _ in found for name in MEASURES)
    lines = [f"layer{title}".rstrip(), f"     {names}".rstrip()]
    for layer in range(1, len(found["with_sink"].pooled)):
        cells = []
        for similar in found.values():
            for name in MEASURES:
                earlier = getattr(similar, name)[:layer, layer]
                best = int(earlier.argmin() if name == "js" else earlier.argmax())
                cells.append(f"  {best:>2} {earlier[best].item():<7.3f}")
        lines.append(f"{layer:>5}{''.join(cells)}".rstrip())
    return "\n".join(lines)


def plot(title: str, found: dict[str, Similarity], path: str) -> None:
    """Write a PNG: a row of heatmaps with the sink, one without. Raises MinisaError if it cannot be written."""
    from matplotlib.figure import Figure

    from minisa.benchmark.plot import save

    figure = Figure(figsize=(4 * len(MEASURES), 8), layout="constrained")
    grid: Any = figure.subplots(len(found), len(MEASURES))
    for row, (part, similar) in zip(grid, found.items(), strict=True):
        for axes, name in zip(row, MEASURES, strict=True):
            limits = {"cmap": "viridis_r"} if name == "js" else {"cmap": "viridis", "vmax": 1}
            image = axes.imshow(getattr(similar, name).numpy(), vmin=0, origin="lower", **limits)
            figure.colorbar(image, ax=axes, shrink=0.8)
            label = "Jensen–Shannon, bits" if name == "js" else f"cosine, {name.replace('_', ' ')}"
            axes.set_title(f"{label}\n{PARTS[part]}")
    for axes in grid[-1]:
        axes.set_xlabel("follower")
    for axes in grid[:, 0]:
        axes.set_ylabel("leader")
    figure.suptitle(title)
    save(figure, path, dpi=120)
