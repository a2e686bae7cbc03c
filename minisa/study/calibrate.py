"""Head maps: whose attention weights serve a follower's heads best.

For a leader l and a follower f, leader head j in the place of follower head h costs

    error[j, h] = Σ over tokens ‖(P_l,j − P_f,h) · V_f,h · W_o,hᵀ‖²

in what the head adds to the residual stream. One pass of text through the plain model gives it for every pair of
layers; only one window's attention weights are held at a time. A head's best map is its smallest error: many follower
heads may use the same leader head.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from minisa.model import Transformer
from minisa.study.walk import Walk, attention_weights


@torch.inference_mode()
def pair_errors(plain: Transformer, windows: Tensor, progress: Callable[[int], None] = lambda windows: None) -> Tensor:
    """error[l, f, j, h] summed over windows [N, T], as a share of what layer f's attention adds: fp64 [L, L, H, H].

    The share is of Σ‖attention output‖² of the whole layer. Infinite where l does not come before f.
    plain: a model without followers. progress: called with the number of windows done.
    """
    n_layers, n_heads = plain.config.n_layers, plain.config.n_heads
    errors = torch.zeros(n_layers, n_layers, n_heads, n_heads, dtype=torch.float64)
    scale = torch.zeros(n_layers, dtype=torch.float64)
    walk = Walk(plain)
    for number, window in enumerate(windows, 1):
        x = walk.embed(window[None])
        weights: list[Tensor] = []  # [H, T, T] of every layer so far
        for f in range(n_layers):
            queries = walk.queries(f, x)
            weights.append(attention_weights(queries)[0])
            values = walk.values(f, x)[0]
            roots = output_roots(plain, f)
            own = weights[f] @ values.float().repeat_interleave(n_heads // len(values), dim=0) @ roots  # [H, T, D]
            for leader in range(f):
                errors[leader, f] += _errors(weights[leader], values, roots, own)
            after = walk.add_attention(f, x, queries)
            scale[f] += (after - x).square().sum().item()
            x = walk.add_feed_forward(f, after)
        progress(number)
    possible = torch.ones(n_layers, n_layers, dtype=torch.bool).triu(1)  # l before f
    return torch.where(possible[:, :, None, None], errors / scale[None, :, None, None], torch.inf)


def best_map(errors: Tensor) -> tuple[int, ...]:
    """For errors [H, H] of (leader head, follower head): each follower head's best leader head."""
    return tuple(errors.argmin(dim=0).tolist())


def output_roots(model: Transformer, i: int) -> Tensor:
    """R_hᵀ [H, D, D] with ‖z · R_hᵀ‖ = ‖z · W_o,hᵀ‖ for every z [D]: a D × D stand-in for each head's slice of wo."""
    config = model.config
    weight = model.get_parameter(f"layers.{i}.attention.wo.weight").float()
    slices = weight.unflatten(1, (config.n_heads, config.head_dim)).transpose(0, 1)  # [H, dim, D]
    return torch.linalg.qr(slices, mode="r").R.mT


def _errors(weights: Tensor, values: Tensor, roots: Tensor, own: Tensor) -> Tensor:
    """errors [j, h] of leader weights [H, T, T] on values [Hkv, T, D], against `own` [H, T, D], under roots."""
    n_heads, n_kv = len(weights), len(values)
    packed = values.float().transpose(0, 1).flatten(1)  # [T, Hkv·D]
    theirs = (weights @ packed).unflatten(-1, (n_kv, -1))  # [j, T, Hkv, D]
    found = torch.empty(n_heads, n_heads, dtype=torch.float64)
    for h in range(n_heads):
        candidates = theirs[:, :, h // (n_heads // n_kv)] @ roots[h]  # [j, T, D]
        found[:, h] = (candidates - own[h]).square().sum((1, 2)).double()
    return found
