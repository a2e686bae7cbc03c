"""Head maps of a follower in its place: chosen together, for wo as it is or for a wo to be fitted.

A map by calibrate.py asks of each follower head alone which leader head is most like it. But errors of heads add up, or
cancel; and where wo is fitted anew the question is which H blocks of inputs explain the wanted output best: two that
are alike help little more than one. What either map leaves follows from inner products of all leader heads' outputs on
all value heads, which are summed up over the text once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from minisa.attention import Queries
from minisa.study.calibrate import attention_weights
from minisa.study.findings import Heads
from minisa.study.walk import Walk

RIDGE = 1e-3  # times the mean diagonal: what a few thousand tokens cannot tell is not believed
SWEEPS = 4

Left = Callable[[list[int]], float]  # the share of the wanted output that a map leaves


class Outputs:
    """What every leader head gives on every value head of follower i, over some text.

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

    def left_as_it_is(self) -> Left:
        """Maps compared under the layer's own wo."""
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

    def left_fitted(self) -> Left:
        """Maps compared under the wo that least squares would give them."""
        gram = self.gram + RIDGE * self.gram.diagonal().mean() * torch.eye(len(self.gram)).to(self.gram)

        def left(heads: list[int]) -> float:
            # A block that stands there twice counts once.
            blocks = sorted({(j, h // self.config.group_size): (j, h) for h, j in enumerate(heads)}.values())
            rows = torch.cat([self._rows(j, h) for j, h in blocks])
            factor = torch.linalg.cholesky(gram[rows][:, rows])
            won = torch.linalg.solve_triangular(factor, self.cross[rows], upper=False).square().sum().item()
            return 1 - won / self.square

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
