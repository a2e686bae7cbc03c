"""The layers that a baseline does best to change: greedily, by measured loss.

Each round tries every layer not yet changed and keeps the one that costs least. After the first round only the
KEPT layers that cost least by themselves are tried again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

from torch import Tensor

from minisa.errors import MinisaError
from minisa.model import Transformer
from minisa.study.baselines import Baseline, altered
from minisa.study.loss import NO_NUMBERS, token_losses

KEPT = 12
SOURCES = 2  # earlier layers whose keys and values are tried: the nearest that have some of their own


def cheapest(
    model: Transformer,
    windows: Tensor,
    kind: str,
    n: int,
    progress: Callable[[float], None] = lambda rounds: None,
) -> Iterator[tuple[Baseline, float]]:
    """(baseline, mean loss in nats a token over windows [N, T]) of no layer, of the best one layer, of two, … of n.

    kind: "drop" or "cla". progress: called with the rounds done, of n.
    Raises MinisaError where the plain model's loss is not finite.
    """
    baseline, layers = Baseline(), set(range(model.config.n_layers))
    plain = token_losses(model, windows).double().mean().item()
    if not math.isfinite(plain):
        raise MinisaError(NO_NUMBERS)
    yield baseline, plain
    for number in range(n):
        found = []
        tried = extensions(baseline, kind, layers)
        for layer, candidate in tried:
            with altered(model, candidate):
                found.append((token_losses(model, windows).double().mean().item(), layer, candidate))
            progress(number + len(found) / len(tried))
        if not found:
            return
        found.sort(key=lambda trial: trial[:2])
        loss, _, baseline = found[0]
        if number == 0:
            layers = set(list(dict.fromkeys(layer for _, layer, _ in found))[:KEPT])
        yield baseline, loss


def extensions(baseline: Baseline, kind: str, layers: set[int]) -> list[tuple[int, Baseline]]:
    """(layer, the baseline that changes it too) for each of `layers` that can be; of "cla", for several sources."""
    changed = baseline.dropped | set(baseline.borrowed)
    if kind == "drop":
        return [(layer, replace(baseline, dropped=changed | {layer})) for layer in sorted(layers - changed)]
    found = []
    for layer in sorted(layers - changed - set(baseline.borrowed.values())):
        sources = [source for source in range(layer - 1, -1, -1) if source not in changed][:SOURCES]
        found += [(layer, replace(baseline, borrowed=baseline.borrowed | {layer: source})) for source in sources]
    return found
