"""Head maps made again, in the plan: a follower's heads together, from what it sees once others follow before it.

A map by calibrate.py asks of each follower head alone which leader head is most like it, in the plain model. But errors
of heads add up or cancel, and so do those of layers. Here plain and shared model walk the same text side by side, and
each follower's map is the one that leaves least of the difference between their streams.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from minisa.attention import Queries
from minisa.model import Transformer
from minisa.sharing import SharingPlan
from minisa.study.calibrate import attention_weights
from minisa.study.findings import Heads
from minisa.study.walk import Walk, set_head_map, share

SWEEPS = 4

Left = Callable[[list[int]], float]  # the share of the wanted output that a map leaves


@torch.inference_mode()
def remap(plain: Transformer, plan: SharingPlan, windows: Tensor, batch: int = 2) -> SharingPlan:
    """The plan with every follower's map made again, first to last. plain: without followers. windows [N, T]."""
    theirs, ours = Walk(plain), Walk(share(plain, plan))
    pairs = [(x := theirs.embed(part), x) for part in windows.split(batch)]  # plain and shared stream
    spans: list[dict[int, Queries]] = [{} for _ in pairs]
    maps: dict[int, Heads] = {}
    for i in range(plan.n_layers):
        pairs = [
            (theirs.add_attention(i, wanted, theirs.mixed(i, wanted, theirs.queries(i, wanted))), x)
            for wanted, x in pairs
        ]
        used = [ours.lead_or_follow(i, x, span) for (_, x), span in zip(pairs, spans, strict=True)]
        if i in plan.followers:
            parts = ((x, wanted, queries) for (wanted, x), queries in zip(pairs, used, strict=True))
            left = Outputs(ours, i, parts).left()
            maps[i], _ = descend(left, plan.head_maps[i] or tuple(range(plain.config.n_heads)))
            set_head_map(ours.model, i, maps[i])
        pairs = [
            (
                theirs.add_feed_forward(i, wanted),
                ours.add_feed_forward(i, ours.add_attention(i, x, ours.mixed(i, x, queries))),
            )
            for (wanted, x), queries in zip(pairs, used, strict=True)
        ]
    return SharingPlan.following(plan.n_layers, {i: plan.sources[i] for i in maps}, maps)


class Outputs:
    """Inner products, over some text, of what every leader head gives on every value head of follower i.

    parts: (x before the layer [N, T, dim], the wanted stream after its attention half, the leader's queries). Tokens
    count as in refit.py.
    """

    def __init__(self, walk: Walk, i: int, parts: Iterable[tuple[Tensor, Tensor, Queries]]) -> None:
        self.config = walk.model.config
        self.wo = walk.model.get_parameter(f"layers.{i}.attention.wo.weight").detach().double()
        gram: Tensor | None = None
        cross: Tensor | None = None
        self.square = 0.0
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
                self.square += r.square().sum().item()
        assert gram is not None and cross is not None  # there is text
        self.gram, self.cross = gram.double(), cross.double()

    def left(self) -> Left:
        """Maps compared: ‖what is wanted - what a map gives‖² as a share of ‖what is wanted‖²."""
        n, size = self.config.n_heads, self.config.head_dim
        slices = self.wo.unflatten(1, (n, size)).transpose(0, 1)  # [H, dim, D]
        products = torch.einsum("gad,hae->ghde", slices, slices)  # W_gᵀ W_h
        rows = torch.stack([self._rows(j, h) for h in range(n) for j in range(n)])  # [H·H, D], h first
        inner = torch.empty(n, n, n, n, dtype=torch.float64)  # of what j gives as head h and k as head g: [h, j, g, k]
        along = torch.empty(n, n, dtype=torch.float64)  # with what is wanted: [h, j]
        for h in range(n):
            for j in range(n):
                mine = rows[h * n + j]
                along[h, j] = (self.cross[mine] * slices[h].T).sum()
                for g in range(n):
                    blocks = self.gram[mine][:, rows[g * n : (g + 1) * n].flatten()].unflatten(1, (n, size))
                    inner[h, j, g] = torch.einsum("dke,de->k", blocks, products[h, g]).cpu()

        def left(heads: list[int]) -> float:
            h, j = torch.arange(n), torch.tensor(heads)
            together = inner[h, j][:, h, j].sum()
            return 1 + (together - 2 * along[h, j].sum()).item() / self.square

        return left

    def _rows(self, j: int, h: int) -> Tensor:
        """Where leader head j's output on follower head h's value head stands."""
        size, n_kv = self.config.head_dim, self.config.n_kv_heads
        return (j * n_kv + h // self.config.group_size) * size + torch.arange(size, device=self.gram.device)


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
