"""Head maps chosen again inside a plan, a follower's heads together.

calibrate.py asks for each follower head alone which leader head is most like it, in the plain model. But errors of
heads add up or cancel, and so do those of layers. Here plain and shared model walk the same text side by side, and
each follower's map is the one that leaves least of the difference between their residual streams.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from minisa.attention import Queries
from minisa.model import Transformer
from minisa.sharing import SharingPlan
from minisa.study.walk import Streams, Walk, attention_weights, share, side_by_side

SWEEPS = 4

Heads = tuple[int, ...]
Left = Callable[[list[int]], float]  # the share of the wanted output that a map leaves


@torch.inference_mode()
def remap(plain: Transformer, plan: SharingPlan, windows: Tensor, batch: int = 2) -> SharingPlan:
    """The plan with every follower's map made again, first to last. plain: without followers. windows [N, T]."""
    walk = Walk(share(plain, plan))
    maps: dict[int, Heads] = {}
    first = min(plan.followers, default=plan.n_layers)
    for i, streams in side_by_side(Walk(plain), walk, windows.split(batch), first):
        if i in plan.followers:
            start = plan.head_maps[i] or tuple(range(plain.config.n_heads))
            maps[i], _ = descend(compare_maps(walk, i, streams), start)
            walk.at(i).attention.set_head_map(maps[i], plain.norm.weight.device)
    return SharingPlan.following(plan.n_layers, {i: plan.sources[i] for i in maps}, maps)


@torch.inference_mode()
def compare_maps(walk: Walk, i: int, streams: Iterable[Streams]) -> Left:
    """‖wanted - given by a map‖² / ‖wanted‖² of follower i's attention output over the attention half of some text.

    Tokens are weighted as in refit.py. Holds what every leader head gives on every value head for a window,
    [H, T, Hkv, D].
    """
    config = walk.model.config
    n, size = config.n_heads, config.head_dim
    wo = walk.model.get_parameter(f"layers.{i}.attention.wo.weight").detach().float()
    slices = wo.unflatten(1, (n, size)).transpose(0, 1)  # W [H, dim, D]
    # Inner products of what leader head j gives as head h with what k gives as g, and with what is wanted [h, j].
    inner = torch.zeros(n, n, n, n, dtype=torch.float64)  # [h, j, g, k]
    along = torch.zeros(n, n, dtype=torch.float64)
    square = 0.0
    for wanted, x, queries in streams:
        values = walk.values(i, x).float()
        for row in range(len(x)):
            one = Queries(queries.q[row : row + 1], queries.k[row : row + 1], queries.mask)
            weights, packed = attention_weights(one)[0], values[row].transpose(0, 1).flatten(1)  # [T, Hkv·D]
            weight = 1 / wanted[row].float().norm(dim=-1, keepdim=True)
            given = ((weights @ packed) * weight).unflatten(-1, (-1, size))  # [j, T, Hkv, D]
            goal = (wanted[row] - x[row]).float() * weight
            square += goal.square().sum().item()
            for h in range(n):
                mine = given[:, :, h // config.group_size]  # [j, T, D]
                along[h] += (mine * (goal @ slices[h])).sum((1, 2)).cpu()
                for g in range(h, n):
                    # ⟨W_h a, W_g b⟩ = ⟨W_gᵀ W_h a, b⟩
                    turned = mine @ (slices[h].T @ slices[g])
                    inner[h, :, g] += (turned.flatten(1) @ given[:, :, g // config.group_size].flatten(1).T).cpu()
    for h in range(n):
        for g in range(h):
            inner[h, :, g] = inner[g, :, h].T

    def left(heads: list[int]) -> float:
        h, j = torch.arange(n), torch.tensor(heads)
        together = inner[h, j][:, h, j].sum()
        return 1 + (together - 2 * along[h, j].sum()).item() / square

    return left


def descend(left: Left, start: Heads) -> tuple[Heads, float]:
    """The map that leaves the least, one head changed at a time from `start`, and what it leaves."""
    best = list(start)
    lowest = left(best)
    for _ in range(SWEEPS):
        held = lowest
        for h in range(len(best)):
            for j in range(len(best)):
                tried = [*best[:h], j, *best[h + 1 :]]
                if tried != best and (found := left(tried)) < lowest:
                    best, lowest = tried, found
        if held - lowest < 1e-4:
            break
    return tuple(best), lowest
