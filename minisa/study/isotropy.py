"""How alike the attention of different layers is, on given text.

What the paper shows (Liao & Vargas, arXiv 2407.12866) is the cosine similarity of layers, heads pooled. Two things
flatter it: weights are large on the first token whatever the layer (the "sink"), and pooling hides that head i of one
layer need not look where head i of another does. So four measures are given, each with the first token's column and
without:

    pooled      cosine of the layers' weights averaged over heads
    same head   cosine of head h with head h, averaged over h
    best head   cosine of each head of the later layer with the head of the earlier one it is most like, averaged
    js          Jensen–Shannon divergence in bits (0: the same, 1: disjoint) of each head from the one it is most like

A cosine is taken over all query positions of all windows at once, the weights [T, T] of a head as one long vector.
A divergence is the mean over JS_POSITIONS query positions a window, spread evenly; without the sink each row is
normalized again.

Memory: q and k of every layer for one window, and the weights of all heads for BLOCK query positions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from minisa.attention import Queries
from minisa.errors import MinisaError
from minisa.model import Transformer
from minisa.study.loss import NO_NUMBERS
from minisa.study.walk import Walk, attention_weights

BLOCK = 64  # query positions whose weights are held at once
JS_POSITIONS = 32  # query positions a window whose divergences are taken; each costs (n_layers · n_heads)² rows


@dataclass(frozen=True, slots=True)
class Similarity:
    """[n_layers, n_layers] fp64 each, entry [leader, follower]; symmetric but for best_head and js.

    js is a divergence: 0 is alike. Only entries whose leader is the earlier layer are of use to sharing, and only
    they (and the diagonal) are given for js; the others are NaN.
    """

    pooled: Tensor
    same_head: Tensor
    best_head: Tensor
    js: Tensor


@torch.inference_mode()
def similarity(
    model: Transformer, windows: Tensor, progress: Callable[[int], None] = lambda windows: None
) -> tuple[Similarity, Similarity]:
    """The similarity of a plain model's layers over windows [N, T]: with the first token's column, and without.

    progress: called with the number of windows done. Raises MinisaError where attention weights are not finite.
    """
    config = model.config
    shape = (config.n_layers, config.n_heads, config.n_layers, config.n_heads)
    n, length = config.n_layers * config.n_heads, windows.shape[1]
    sums = torch.zeros(2, n, n, dtype=torch.float64)  # P·Pᵀ: rest, sink column
    divergences = torch.zeros(2, *shape, dtype=torch.float64)
    rows = torch.zeros(2, 1, 1, 1, 1, dtype=torch.float64)
    for done, window in enumerate(windows, 1):
        queries = _queries(Walk(model), window)
        for start in range(0, length, BLOCK):
            weights = _weights(queries, slice(start, start + BLOCK)).flatten(0, 1)  # [L·H, rows, T]
            rest, sink = weights[:, :, 1:].flatten(1), weights[:, :, 0]
            sums += torch.stack((rest @ rest.T, sink @ sink.T)).cpu()
        for t in _spread(length, JS_POSITIONS):
            row = _weights(queries, slice(t, t + 1))[:, :, 0, : t + 1]  # [L, H, t + 1]
            divergences[0] += _divergences(row)
            rows[0] += 1
            if t > 0:  # the first position sees nothing but the first token
                rest = row[..., 1:]
                left = rest.sum(-1, keepdim=True)
                divergences[1] += _divergences(rest / left.clamp(min=torch.finfo(left.dtype).tiny))
                rows[1] += 1
        progress(done)
    if sums.isnan().any():
        raise MinisaError(NO_NUMBERS)
    divergences /= rows
    rest_sums, sink_sums = (part.view(shape) for part in sums)
    return _measures(rest_sums + sink_sums, divergences[0]), _measures(rest_sums, divergences[1])


def _measures(products: Tensor, divergences: Tensor) -> Similarity:
    """From Σ P·P of every pair of heads [L, H, L, H], and their mean divergences."""
    pooled = products.sum((1, 3))
    norms = products.flatten(2).flatten(0, 1).diagonal().sqrt().view(products.shape[:2])  # [L, H]
    cosines = products / (norms[:, :, None, None] * norms)
    upper = torch.ones(pooled.shape, dtype=torch.bool).triu()
    return Similarity(
        pooled=pooled / (pooled.diagonal()[:, None] * pooled.diagonal()).sqrt(),
        same_head=cosines.diagonal(dim1=1, dim2=3).mean(-1),
        best_head=cosines.amax(1).mean(-1),
        js=divergences.amin(1).mean(-1).masked_fill(~upper, torch.nan),
    )


def _divergences(weights: Tensor) -> Tensor:
    """Jensen–Shannon divergence in bits of every pair of heads [L, H, L, H] fp64, the leader first, of one query
    position's weights [L, H, S]; zero where the leader is the later layer, which is not computed."""
    n_layers, n_heads, _ = weights.shape
    entropies = _entropy(weights)  # [L, H]
    found = torch.zeros(n_layers, n_heads, n_layers, n_heads, dtype=torch.float64)
    for leader in range(n_layers):
        followers = weights[leader:]  # [F, H, S]
        middle = (weights[leader][:, None, None] + followers) / 2  # [H, F, H, S]
        between = _entropy(middle) - (entropies[leader][:, None, None] + entropies[leader:]) / 2
        found[leader, :, leader:] = between.clamp(min=0).cpu().double()
    return found


def _entropy(weights: Tensor) -> Tensor:
    """In bits, over the last dimension."""
    return torch.special.entr(weights).sum(-1) / torch.log(torch.tensor(2.0))


def _spread(length: int, count: int) -> list[int]:
    """At most `count` of the positions 0..length - 1, spread evenly, the last among them."""
    count = min(count, length)
    return [(i + 1) * length // count - 1 for i in range(count)]


def _weights(queries: list[Queries], rows: slice) -> Tensor:
    """The attention weights fp32 [L, H, rows, T] of some query positions in every layer."""
    return torch.cat([attention_weights(each, rows) for each in queries])


def _queries(walk: Walk, window: Tensor) -> list[Queries]:
    """What every layer's attention weights follow from, for tokens [T]."""
    x, found = walk.embed(window[None]), []
    for i in range(walk.plan.n_layers):
        found.append(walk.queries(i, x))
        x = walk.add_feed_forward(i, walk.add_attention(i, x, found[i]))
    return found
