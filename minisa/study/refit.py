"""Refit: output matrices that make up for what sharing changed, by ridge regression; no run-time cost.

Plain and shared model walk the same text side by side. After every attention half (and, if asked, every feed-forward
half) the shared model's residual stream differs from the plain one's by R [tokens, dim]. With F the inputs of the
half's last matrix W (wo or w2), the correction D that makes

    ‖F · Dᵀ - R‖² + λ ‖D‖²

smallest is found in closed form and W + D takes W's place, before the walk goes on: each layer sees, and makes up
for, the errors before it. λ is the candidate that leaves the least on held-out windows; if leaving W alone is
better still, it stays.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from minisa.attention import Queries
from minisa.model import Transformer
from minisa.sharing import SharingPlan
from minisa.study.walk import Walk, replace, share

WHICH = ("followers", "wo", "all")
LAMBDAS = (1e-4, 1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0, 10.0)  # times the mean square of F's columns, a token


@dataclass(frozen=True, slots=True)
class Correction:
    """One matrix refitted. before, after: Σ‖R‖² on held-out text as a share of Σ‖stream‖², without and with it."""

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
    which: str = "followers",
    weights: Mapping[str, Tensor] | None = None,
    batch: int = 4,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[dict[str, Tensor], list[Correction]]:
    """Replacements for the plan's weights, by parameter name, and what each did.

    plain: without followers. windows, held_out [N, T] of the same length. which: "followers" (their wo), "wo" (that
    of every layer from the first follower on) or "all" (w2 as well). weights: what
    the plan brings already, in the place of the model's.
    progress: called with (layers done, in all).
    """
    shared = replace(share(plain, plan), weights or {})
    theirs, ours = Walk(plain), Walk(shared)
    parts = [*windows.split(batch), *held_out.split(batch)]
    n_train = -(-len(windows) // batch)
    pairs = [(x := theirs.embed(part), x) for part in parts]  # plain and shared streams of each part
    spans: list[dict[int, Queries]] = [{} for _ in parts]
    replaced, corrections = {}, []
    first = min(plan.followers, default=plan.n_layers)
    for i in range(plan.n_layers):
        for half in ("attention.wo", "feed_forward.w2"):
            name = f"layers.{i}.{half}.weight"
            weight = shared.get_parameter(name)
            inputs, streams = [], []
            for n, (wanted, x) in enumerate(pairs):
                if half == "attention.wo":
                    wanted = theirs.add_attention(i, wanted, theirs.mixed(i, wanted, theirs.queries(i, wanted)))
                    features = ours.mixed(i, x, ours.lead_or_follow(i, x, spans[n]))
                else:
                    wanted = theirs.add_feed_forward(i, wanted)
                    features = ours.gated(i, x)
                inputs.append(features)
                streams.append((wanted, x + F.linear(features, weight)))
            asked = (half == "attention.wo" and (which != "followers" or i in plan.followers)) or which == "all"
            if asked and i >= first:
                rest = [wanted - x for wanted, x in streams]
                size = sum(wanted.square().sum().item() for wanted, _ in streams[n_train:])
                found, correction = _solve(inputs, rest, n_train, size, name)
                corrections.append(correction)
                if found is not None:
                    replaced[name] = weight + found.to(weight)
                    replace(shared, {name: replaced[name]})
                    delta = replaced[name] - weight
                    streams = [(w, x + F.linear(f, delta)) for (w, x), f in zip(streams, inputs, strict=True)]
            pairs = streams
        if progress:
            progress(i + 1, plan.n_layers)
    return dict(weights or {}) | replaced, corrections


def _solve(
    inputs: list[Tensor], rest: list[Tensor], n_train: int, size: float, name: str
) -> tuple[Tensor | None, Correction]:
    """The correction D [out, in] of the λ that leaves the least held out, or None if none helps."""
    gram, cross, _ = _moments(inputs[:n_train], rest[:n_train])
    check_gram, check_cross, before = _moments(inputs[n_train:], rest[n_train:])
    scale = gram.diagonal().mean()
    best: tuple[float, float, Tensor | None] = (before, float("inf"), None)
    values, vectors = torch.linalg.eigh(gram)
    turned = vectors.T @ cross
    for ridge in LAMBDAS:
        solution = vectors @ (turned / (values.clamp(min=0) + ridge * scale)[:, None])  # Dᵀ [in, out]
        after = before - 2 * (solution * check_cross).sum().item() + (solution * (check_gram @ solution)).sum().item()
        if after < best[0]:
            best = (after, ridge, solution.T)
    return best[2], Correction(name, best[1], before / size, best[0] / size)


def _moments(inputs: list[Tensor], rest: list[Tensor]) -> tuple[Tensor, Tensor, float]:
    """FᵀF [in, in], FᵀR [in, out] and Σ‖R‖², in fp64."""
    gram: Tensor | None = None
    cross: Tensor | None = None
    square = 0.0
    for features, wanted in zip(inputs, rest, strict=True):
        f, r = features.flatten(0, 1).float(), wanted.flatten(0, 1).float()
        gram = (f.T @ f).double() + (0 if gram is None else gram)
        cross = (f.T @ r).double() + (0 if cross is None else cross)
        square += r.square().sum(dtype=torch.float64).item()
    assert gram is not None and cross is not None  # there is text
    return gram, cross, square
