"""What `isotropy` found, as a table, as a JSON record and as heatmaps."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from minisa.benchmark.plot import check_matplotlib, save
from minisa.study.isotropy import Similarity
from minisa.study.results import Record

MEASURES = ("pooled", "same_head", "best_head", "js")
PARTS = {"with_sink": "whole", "without_sink": "first token left out"}


def as_record(settings: Record, whole: Similarity, rest: Similarity) -> Record:
    """The settings, and every matrix as [leader][follower]; null for what is not defined."""
    parts = zip(PARTS, (whole, rest), strict=True)
    return {
        "settings": settings,
        **{part: {name: _rows(getattr(found, name)) for name in MEASURES} for part, found in parts},
    }


def _rows(matrix: Tensor) -> list[list[float | None]]:
    return [[round(x, 6) if math.isfinite(x) else None for x in row] for row in matrix.tolist()]


def table(whole: Similarity, rest: Similarity) -> str:
    """For each layer the earlier one it is most like, by each measure."""
    title = "".join(f"  {heading:<{12 * len(MEASURES) - 2}}" for heading in PARTS.values())
    names = "".join(f"  {name.replace('_', ' '):<10}" for _ in PARTS for name in MEASURES)
    lines = [f"layer{title}".rstrip(), f"     {names}".rstrip()]
    for layer in range(1, len(whole.pooled)):
        cells = []
        for found in (whole, rest):
            for name in MEASURES:
                earlier = getattr(found, name)[:layer, layer]
                best = int(earlier.argmin() if name == "js" else earlier.argmax())
                cells.append(f"  {best:>2} {earlier[best].item():<7.3f}")
        lines.append(f"{layer:>5}{''.join(cells)}".rstrip())
    return "\n".join(lines)


def plot(title: str, whole: Similarity, rest: Similarity, path: str) -> None:
    """Write a PNG: a row of heatmaps with the sink, one without. MinisaError where it cannot be done."""
    check_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(MEASURES), 8), layout="constrained")
    grid: Any = figure.subplots(len(PARTS), len(MEASURES))
    for row, found, part in zip(grid, (whole, rest), PARTS.values(), strict=True):
        for axes, name in zip(row, MEASURES, strict=True):
            divergence = name == "js"
            image = axes.imshow(
                getattr(found, name).numpy(),
                vmin=0,
                vmax=None if divergence else 1,
                cmap="viridis_r" if divergence else "viridis",
                origin="lower",
            )
            figure.colorbar(image, ax=axes, shrink=0.8)
            label = "Jensen–Shannon, bits" if divergence else f"cosine, {name.replace('_', ' ')}"
            axes.set_title(f"{label}\n{part}")
    for axes in grid[-1]:
        axes.set_xlabel("follower")
    for axes in grid[:, 0]:
        axes.set_ylabel("leader")
    figure.suptitle(title)
    save(figure, path, dpi=120)
