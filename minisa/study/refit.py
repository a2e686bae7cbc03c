"""Refit: output matrices that make up for what sharing changed, by ridge regression.

Plain and shared model walk the same text side by side. After a follower's attention the shared model's residual stream
differs from the plain one's by R [tokens, dim]. With F the inputs of its wo, W, the correction D that makes

    Σ over tokens ‖D · F_t - R_t‖² / ‖stream_t‖²  +  λ ‖D‖²

smallest is found in closed form and W + D takes W's place, before the walk goes on: each layer sees, and makes up
for, the errors before it. Errors count in proportion to the stream, whose length the next norm divides away: a sink
token's is hundreds of times that of others. λ is the candidate that leaves the least on held-out windows; if leaving
W alone is better still, it stays.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from minisa.model import Transformer
from minisa.sharing import SharingPlan
from minisa.study.walk import Streams, Walk, layer_of, replace, share, side_by_side

LAMBDAS = (1e-5, 1e-4, 1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0)  # times the mean diagonal of FᵀF


@dataclass(frozen=True, slots=True)
class Correction:
    """One matrix refitted. before, after: the mean of ‖R‖² / ‖stream‖² on held-out text, without and with it."""

    name: str
    ridge: float
    before: float
    after: float


@torch.inference_mode()
def refit(
    plain: Transformer,
    plan: SharingPlan,
    windows: Tensor,
    held_out: Tensor,
    *,
    weights: Mapping[str, Tensor] | None = None,
    batch: int = 4,
    progress: Callable[[int], None] = lambda layers: None,
) -> tuple[dict[str, Tensor], list[Correction]]:
    """Replacements for the plan's weights, by parameter name, and what each did.

    plain: without followers. windows, held_out [N, T] of the same length. weights: what the plan brings already, in
    place of the model's. progress: called with the number of layers done.
    """
    weights = dict(weights or {})
    walk = Walk(replace(share(plain, plan), weights))
    parts = [*windows.split(batch), *held_out.split(batch)]
    n_train = -(-len(windows) // batch)
    first = min([*plan.followers, *map(layer_of, weights)])
    corrections = []
    for i, streams in side_by_side(Walk(plain), walk, parts, first):
        progress(i)
        if i in plan.followers:
            name = f"layers.{i}.attention.wo.weight"
            found, correction = _corrected(walk, i, name, streams, n_train)
            corrections.append(correction)
            if found is not None:
                weights[name] = found
                replace(walk.model, {name: found})
    return weights, corrections


def _corrected(walk: Walk, i: int, name: str, streams: list[Streams], n_train: int) -> tuple[Tensor | None, Correction]:
    """W + D of the λ that leaves the least held out, or None if none helps.

    streams: n_train of windows to fit to, then those held out.
    """
    weight = walk.model.get_parameter(name)
    fit, held_out = _Moments(), _Moments()
    for n, (wanted, x, queries) in enumerate(streams):
        features = walk.mixed(i, x, queries)
        (fit if n < n_train else held_out).add(features, wanted - x - F.linear(features, weight), wanted)
    values, vectors = torch.linalg.eigh(fit.gram)
    turned = vectors.T @ fit.cross
    before = held_out.left(torch.zeros_like(fit.cross))
    best: tuple[float, float, Tensor | None] = (before, float("inf"), None)
    for ridge in LAMBDAS:
        solution = vectors @ (turned / (values.clamp(min=0) + ridge * fit.gram.diagonal().mean())[:, None])
        after = held_out.left(solution)
        if after < best[0]:
            best = (after, ridge, weight + solution.T.to(weight))
    return best[2], Correction(name, best[1], before, best[0])


class _Moments:
    """FᵀF [in, in] and FᵀR [in, dim] over tokens, each divided by the length of its wanted stream; fp64."""

    gram: Tensor
    cross: Tensor

    def __init__(self) -> None:
        self._square = 0.0  # Σ‖R‖²
        self._count = 0

    def add(self, features: Tensor, rest: Tensor, wanted: Tensor) -> None:
        """Tokens with F [N, T, in], R [N, T, dim] and the wanted stream [N, T, dim]."""
        share = 1 / wanted.float().norm(dim=-1, keepdim=True)
        f, r = (features.float() * share).flatten(0, 1), (rest.float() * share).flatten(0, 1)
        gram, cross = (f.T @ f).double(), (f.T @ r).double()
        self.gram, self.cross = (gram, cross) if not self._count else (self.gram + gram, self.cross + cross)
        self._square += r.square().sum(dtype=torch.float64).item()
        self._count += len(f)

    def left(self, solution: Tensor) -> float:
        """The mean of ‖R‖² a token with the correction Dᵀ [in, dim]."""
        gained = 2 * (solution * self.cross).sum() - (solution * (self.gram @ solution)).sum()
        return (self._square - gained.item()) / self._count
