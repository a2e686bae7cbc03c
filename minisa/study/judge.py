"""Judge: measures plans on held-out text, running again only the layers a plan changes.

The measure is the mean KL divergence, in nats a token, of the shared model's predictions from the plain model's. It
varies from window to window far less than the loss itself: a few thousand tokens tell plans apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from minisa.errors import MinisaError
from minisa.model import Transformer
from minisa.sharing import SharingPlan
from minisa.study.loss import NO_NUMBERS
from minisa.study.walk import Walk, layer_of, replace, share

ROWS = 256  # positions whose predictions are held at once


class Judge:
    """The divergence of plans from a plain model.

    windows [N, T]. every: one position in so many is compared; those between say little more and cost a row of the
    vocabulary each. batch: windows run together.
    Raises MinisaError where the plain model's predictions are not finite.
    Holds the hidden states before every layer, (L + 1) · N · T · dim numbers, and the plain predictions.
    """

    def __init__(self, plain: Transformer, windows: Tensor, every: int = 2, batch: int = 2) -> None:
        self.plain = plain
        self.every = every
        self.plan = SharingPlan.none(plain.config.n_layers)
        walk = Walk(plain)
        self._states: list[list[Tensor]] = []  # for each batch of windows, before each layer and after the last
        with torch.inference_mode():
            for part in windows.split(batch):
                first = walk.embed(part)
                self._states.append([first, *walk.onward([first], 0)])
            self._targets = [self._predictions(states[-1]) for states in self._states]
            self._entropy = [
                -sum(torch.special.xlogy(p, p).sum().item() for p in rows.split(ROWS)) for rows in self._targets
            ]
        if not all(map(math.isfinite, self._entropy)):
            raise MinisaError(NO_NUMBERS)

    def rebase(self, plan: SharingPlan) -> None:
        """Start from this plan's states from now on: plans that differ from it late are measured sooner."""
        start = first_difference(self.plan, plan)
        walk = Walk(share(self.plain, plan))
        with torch.inference_mode():
            for states in self._states if start < plan.n_layers else ():
                states[start + 1 :] = list(walk.onward(states, start))
        self.plan = plan

    @torch.inference_mode()
    def divergence(self, plan: SharingPlan, weights: Mapping[str, Tensor] | None = None) -> float:
        """Mean KL(plain ‖ shared) in nats a token. weights: in place of the model's, by parameter name."""
        model = replace(share(self.plain, plan), weights or {})
        start = min([first_difference(self.plan, plan), *map(layer_of, weights or {})])
        walk = Walk(model)
        total, count = 0.0, 0
        for states, target, entropy in zip(self._states, self._targets, self._entropy, strict=True):
            *_, last = states[start], *walk.onward(states, start)
            total += self._cross_entropy(last, target) - entropy
            count += len(target)
        return total / count

    def _predictions(self, state: Tensor) -> Tensor:
        rows = self._rows(state)
        return torch.cat([self.plain.head(part).float().log_softmax(-1) for part in rows.split(ROWS)]).exp()

    def _cross_entropy(self, state: Tensor, target: Tensor) -> float:
        total = 0.0
        for part, wanted in zip(self._rows(state).split(ROWS), target.split(ROWS), strict=True):
            logits = self.plain.head(part).float()
            expected = torch.einsum("nv,nv->n", logits, wanted)
            total += (logits.logsumexp(-1) - expected).sum(dtype=torch.float64).item()
        return total

    def _rows(self, state: Tensor) -> Tensor:
        return self.plain.norm(state[:, self.every - 1 :: self.every]).flatten(0, 1)


def first_difference(one: SharingPlan, other: SharingPlan) -> int:
    """The first layer two plans treat differently; n_layers where there is none."""
    pairs = zip(one.sources, other.sources, one.head_maps, other.head_maps, strict=True)
    return next((i for i, (a, b, c, d) in enumerate(pairs) if (a, c) != (b, d)), one.n_layers)
