"""lead() and follow(): the two halves of Shared Attention.

    lead    q, k, v   →  P = softmax(q·Kᵀ/√d + mask),  P·V          and what its followers need
    follow            →  the same P, head by head through the head map,  P·V_own

Two backends with one signature. `reference` is the authors' algorithm written out: P is a tensor and is shared.
`torch` gives the same numbers without ever holding a T×T matrix: for several query rows a follower is a fused
attention call on the leader's q and k and its own v; for one row (decoding) P is a single row and is kept.

Shapes: q [B, H, T, D]; k, v [B, Hkv, S, D], where H is a multiple of Hkv and query head h belongs to key and
value head h // (H / Hkv); P [B, H, T, S].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Queries(NamedTuple):
    """What attention weights follow from: the leader's own q [B, H, T, D], k [B, Hkv, S, D] and mask."""

    q: Tensor
    k: Tensor
    mask: Tensor | None


Shared = Tensor | Queries  # what a leader leaves for its followers: P [B, H, T, S], or how to have it again


@dataclass(frozen=True, slots=True)
class AttentionBackend:
    """A pair of functions.

    lead(q, k, v, mask) -> (output [B, H, T, D], what followers need)
    follow(shared, v, head_map) -> output [B, H, T, D]; head_map [H] int64, None for the identity
    """

    lead: Callable[[Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, Shared]]
    follow: Callable[[Shared, Tensor, Tensor | None], Tensor]


def visible_slots(positions: Tensor, length: int, window: int | None = None) -> Tensor | None:
    """Which of `length` cache slots each query may attend to: bool [B, 1, T, length], True for visible.

    positions [B, T] ascend along T. None stands for plain causal attention of T queries over T slots, which
    fused kernels know without a mask. window: tokens a query looks back over, itself included.
    """
    if positions.shape[1] == length and (window is None or window >= length):
        return None
    slots = torch.arange(length, device=positions.device)
    visible = slots <= positions[:, None, :, None]  # [B, 1, T, length]
    if window is not None:
        visible &= slots > positions[:, None, :, None] - window
    return visible


def _lead_reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Shared]:
    k = _for_each_query_head(k, q.shape[1])
    scores = q @ k.mT / q.shape[-1] ** 0.5  # [B, H, T, S]
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = scores.float().softmax(dim=-1).type_as(q)
    return weights @ _for_each_query_head(v, q.shape[1]), weights


def _follow_reference(shared: Shared, v: Tensor, head_map: Tensor | None) -> Tensor:
    assert isinstance(shared, Tensor)
    weights = shared if head_map is None else shared[:, head_map]
    return weights @ _for_each_query_head(v, weights.shape[1])


def _lead_torch(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Shared]:
    if q.shape[2] > 1:
        return _fused(q, k, v, mask), Queries(q, k, mask)
    scores = _grouped(q, k) @ k.mT / q.shape[-1] ** 0.5  # [B, Hkv, H/Hkv, S]
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    weights = scores.float().softmax(dim=-1).type_as(q)
    return (weights @ v).view_as(q), weights.flatten(1, 2).unsqueeze(2)


def _follow_torch(shared: Shared, v: Tensor, head_map: Tensor | None) -> Tensor:
    if isinstance(shared, Tensor):
        weights = shared if head_map is None else shared[:, head_map]  # [B, H, 1, S]
        return (_grouped(weights, v) @ v).flatten(1, 2).unsqueeze(2)  # [B, H, 1, D]
    q, k, mask = shared
    if head_map is not None:
        # Any query head may now meet any value head, so keys and values are laid out one a query head.
        n_heads = q.shape[1]
        q, k = q[:, head_map], k[:, head_map // (n_heads // k.shape[1])]
        v = _for_each_query_head(v, n_heads)
    return _fused(q, k, v, mask)


def _fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=q.shape[1] != k.shape[1]
    )


def _grouped(x: Tensor, kv: Tensor) -> Tensor:
    """[B, H, 1, N] → [B, Hkv, H/Hkv, N]: the query heads of each key and value head together."""
    return x.reshape(x.shape[0], kv.shape[1], -1, x.shape[-1])


def _for_each_query_head(kv: Tensor, n_heads: int) -> Tensor:
    """[B, Hkv, S, D] → [B, H, S, D]."""
    return kv.repeat_interleave(n_heads // kv.shape[1], dim=1)


BACKENDS: dict[str, AttentionBackend] = {
    "reference": AttentionBackend(_lead_reference, _follow_reference),
    "torch": AttentionBackend(_lead_torch, _follow_torch),
}
