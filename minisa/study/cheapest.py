"""The layers that a rival does best to change: greedily, by measured loss.

Each round tries every layer not yet changed and keeps the one that costs least. After the first round only the
KEPT layers that cost least by themselves are tried again. A trial runs the model from the layer it changes on: what
comes before, hidden states, keys and values, is there from the round's beginning.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from minisa.attention import visible_slots
from minisa.cache import StaticCache
from minisa.errors import MinisaError
from minisa.model import Layer, Transformer
from minisa.study.loss import NO_NUMBERS, losses_of, window_cache
from minisa.study.rivals import Rival, altered

KEPT = 12
SOURCES = 2  # earlier layers whose keys and values are tried: the nearest that have some of their own


@dataclass(frozen=True, slots=True)
class Step:
    """The best rival of so many layers, and the mean loss it was chosen for, in nats a token."""

    rival: Rival
    loss: float


@torch.inference_mode()
def cheapest(
    model: Transformer,
    windows: Tensor,
    kind: str,
    n: int,
    batch: int = 4,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Step]:
    """The plain model's loss over windows [N, T], then the best rival of one layer, of two, … of n.

    kind: "drop" or "cla". batch: windows run together. progress: called with (layers run, layers to run in all).
    Raises MinisaError where the plain model's loss is no number.
    """
    trials = _Trials(model, windows, batch)
    rival = Rival()
    n_layers = model.config.n_layers
    plain = trials.loss(n_layers)
    if not math.isfinite(plain):
        raise MinisaError(NO_NUMBERS)
    yield Step(rival, plain)
    layers = set(range(n_layers))
    done, total = 0, 0
    for number in range(n):
        tried = sorted(extensions(rival, kind, layers, n_layers), key=lambda trial: trial[0], reverse=True)
        if not tried:
            return
        cost = sum(n_layers - layer for layer, _ in tried)
        total = done + cost + (cost * min(KEPT, n_layers) // len(layers) if number == 0 else cost) * (n - number - 1)
        found = []
        # Later layers first: a trial leaves other keys and values from its layer on, and no later trial looks there.
        for layer, candidate in tried:
            with altered(model, candidate):
                found.append((trials.loss(layer), layer, candidate))
            done += n_layers - layer
            if progress:
                progress(done, total)
        loss, _, rival = min(found, key=lambda trial: trial[:2])
        with altered(model, rival):
            trials.rebase(tried[-1][0])  # the last trial's keys and values, from its layer on, are still there
        if number == 0:
            by_loss = sorted(found, key=lambda trial: trial[:2])
            layers = set(list(dict.fromkeys(layer for _, layer, _ in by_loss))[:KEPT])
        yield Step(rival, loss)


def extensions(rival: Rival, kind: str, layers: set[int], n_layers: int) -> list[tuple[int, Rival]]:
    """(layer, the rival that changes it too) for each of `layers` that can be; of "cla", for several sources."""
    changed = rival.dropped | set(rival.borrowed)
    if kind == "drop":
        return [(layer, replace(rival, dropped=rival.dropped | {layer})) for layer in layers - changed]
    found = []
    for layer in layers - changed - set(rival.borrowed.values()):
        sources = [source for source in range(layer - 1, -1, -1) if source not in changed][:SOURCES]
        found += [(layer, replace(rival, borrowed=rival.borrowed | {layer: source})) for source in sources]
    return found


class _Trials:
    """Hidden states before every layer and after the last, keys and values, of the model as it was at `rebase`."""

    def __init__(self, model: Transformer, windows: Tensor, batch: int) -> None:
        self._model = model
        weight = model.norm.weight
        self._parts = [part.to(weight.device) for part in windows.split(batch)]
        self._positions = torch.arange(windows.shape[1], device=weight.device)
        self._mask = visible_slots(self._positions[None], windows.shape[1], model.config.sliding_window)
        self._caches = [window_cache(model, len(part), windows.shape[1]) for part in self._parts]
        self._states = [[model.tok_embeddings(part)] for part in self._parts]
        self.rebase(0)

    def rebase(self, start: int) -> None:
        """Run the model as it is now from layer `start` on, and keep the states."""
        for states, cache in zip(self._states, self._caches, strict=True):
            states[start + 1 :] = list(self._onward(states[start], start, cache))

    def loss(self, start: int) -> float:
        """Mean loss of the model as it is now, which differs from that of the states from layer `start` on."""
        losses = []
        for part, states, cache in zip(self._parts, self._states, self._caches, strict=True):
            x = states[start]
            for after in self._onward(x, start, cache):
                x = after
            losses.append(losses_of(self._model, self._model.norm(x), part))
        return torch.cat(losses).double().mean().item()

    def _onward(self, x: Tensor, start: int, cache: StaticCache) -> Iterator[Tensor]:
        positions = self._positions.expand(len(x), -1)
        angles = self._model.angles(positions)
        for i in range(start, self._model.config.n_layers):
            layer = self._model.layers[i]
            assert isinstance(layer, Layer)  # for the type checker
            x, _ = layer.lead(x, i, positions, angles, self._mask, cache)
            yield x
