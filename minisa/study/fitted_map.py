"""Head maps for refitted matrices: the leader heads whose weights let wo win back the most.

A map by calibrate.py asks which leader head is most like a follower head as it is. Where wo is fitted anew the question
is another: of all leader heads on all value heads, which H blocks of inputs explain the wanted output best? Two
that are alike help little more than one. The least squares left over follow from inner products that are summed up
once, so maps can be compared without going through the text again.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from minisa.attention import Queries
from minisa.study.calibrate import attention_weights
from minisa.study.findings import Heads
from minisa.study.walk import Walk

RIDGE = 1e-3  # times the mean diagonal: what a few thousand tokens cannot tell is not believed
SWEEPS = 3


@torch.inference_mode()
def fitted_map(
    walk: Walk, i: int, parts: Iterable[tuple[Tensor, Tensor, Queries]], start: Heads
) -> tuple[Heads, float, float]:
    """The map of follower i that leaves the least when wo is fitted to it, found head by head from `start`.

    parts: (x before the layer [N, T, dim], the wanted stream after its attention half, the leader's queries).
    Returns the map, and the share of the wanted output that is left with `start` and with it.
    """
    gram, cross, square = _moments(walk, i, parts)
    config = walk.model.config
    group, size = config.group_size, config.head_dim
    gram += RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)

    def left(heads: list[int]) -> float:
        blocks = [(j * config.n_kv_heads + h // group) * size for h, j in enumerate(heads)]
        rows = (torch.tensor(blocks)[:, None] + torch.arange(size)).flatten().to(gram.device)
        # A block may stand there twice, and then counts once.
        factor = torch.linalg.cholesky(gram[rows][:, rows] + 1e-9 * gram[0, 0] * torch.eye(len(rows)).to(gram))
        return 1 - torch.linalg.solve_triangular(factor, cross[rows], upper=False).square().sum().item() / square

    best = list(start)
    before = lowest = left(best)
    for _ in range(SWEEPS):
        held = lowest
        for h in range(config.n_heads):
            for j in range(config.n_heads):
                tried = [*best[:h], j, *best[h + 1 :]]
                others = {best[g] for g in range(config.n_heads) if g != h and g // group == h // group}
                if j == best[h] or j in others:  # its block is there already
                    continue
                found = left(tried)
                if found < lowest:
                    best, lowest = tried, found
        if held - lowest < 1e-4:
            break
    return tuple(best), before, lowest


def _moments(walk: Walk, i: int, parts: Iterable[tuple[Tensor, Tensor, Queries]]) -> tuple[Tensor, Tensor, float]:
    """Inner products of every leader head's output on every value head, [H·Hkv·D, H·Hkv·D], with the wanted output,
    [H·Hkv·D, dim], and its own; tokens count as in refit.py."""
    gram: Tensor | None = None
    cross: Tensor | None = None
    square = 0.0
    for x, wanted, queries in parts:
        values = walk.values(i, x)
        for row in range(len(x)):
            one = Queries(queries.q[row : row + 1], queries.k[row : row + 1], queries.mask)
            packed = values[row].float().transpose(0, 1).flatten(1)  # [T, Hkv·D]
            outputs = (attention_weights(one)[0] @ packed).transpose(0, 1).flatten(1)  # [T, H·Hkv·D]
            share = 1 / wanted[row].float().norm(dim=-1, keepdim=True)
            f, r = outputs * share, (wanted[row] - x[row]).float() * share
            gram = (f.T @ f) + (0 if gram is None else gram)
            cross = (f.T @ r) + (0 if cross is None else cross)
            square += r.square().sum().item()
    assert gram is not None and cross is not None  # there is text
    return gram.double(), cross.double(), square
