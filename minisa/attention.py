"""lead() and follow(): the two halves of Shared Attention.

    lead    q, k, v   →  P = softmax(q·Kᵀ/√d + mask),  P·V          and what its followers need
    follow            →  the same P, head by head through the head map,  P·V_own

Backends with one signature. `reference` is the authors' algorithm written out: P is a tensor and is shared. `torch`
gives the same numbers without ever holding a T×T matrix: for several query rows a follower is a fused attention call on
the leader's q and k and its own v; for one row (decoding) P is a single row and is kept. `kernels` is `torch` with one
query, or a few, in Triton (runners/kernels/decode_attention.py).

Shapes: q [B, H, T, D]; k, v [B, Hkv, S, D], where H is a multiple of Hkv and query head h belongs to key and
value head h // (H / Hkv); P [B, H, T, S]. k and v may be of a narrower dtype than q: they are widened to it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_MASK_ELEMENTS = 1 << 25  # at a time: on a CPU the fused call turns a mask's booleans into floats


class Queries(NamedTuple):
    """What attention weights follow from: the leader's own q [B, H, T, D], k [B, Hkv, S, D] and mask."""

    q: Tensor
    k: Tensor
    mask: Tensor | None


class HeadMap(NamedTuple):
    """Whose attention weights a follower's heads use.

    heads [H] int64: the leader's query head for each query head.
    keys [Hkv] int64: the leader's key head for each value head; None where the heads of a group use several.
    """

    heads: Tensor
    keys: Tensor | None

    @classmethod
    def of(cls, heads: Sequence[int], n_kv_heads: int, device: torch.device | str = "cpu") -> HeadMap:
        group = len(heads) // n_kv_heads
        met = [{head // group for head in heads[start : start + group]} for start in range(0, len(heads), group)]
        keys = [next(iter(keys)) for keys in met] if all(len(keys) == 1 for keys in met) else None
        return cls(torch.tensor(heads, device=device), None if keys is None else torch.tensor(keys, device=device))


Visible = Any  # which slots the queries see, in a form of the backend's own
Shared = Any  # what a leader leaves for its followers, likewise


@dataclass(frozen=True, slots=True)
class AttentionBackend:
    """Three functions.

    visible(positions [B, T], length, window, ring) -> what lead() takes as `visible`
    lead(q, k, v, visible) -> (output [B, H, T, D], what followers need)
    follow(shared, v, head_map) -> output [B, H, T, D]; head_map None is the identity
    """

    name: str
    visible: Callable[..., Visible]
    lead: Callable[[Tensor, Tensor, Tensor, Visible], tuple[Tensor, Shared]]
    follow: Callable[[Shared, Tensor, HeadMap | None], Tensor]


def visible_slots(positions: Tensor, length: int, window: int | None = None, ring: bool = False) -> Tensor | None:
    """Which of `length` cache slots each query may attend to: bool [B, 1, T, length], True for visible.

    None stands for plain causal attention of T queries over T slots, and on a GPU a CausalBias for that of the last T
    of more slots: fused kernels need no mask for either.
    positions [B, T] ascend along T; for B = 1 and T > 1 they are the last T of the slots.
    window: tokens a query looks back over, itself included.
    ring: position p lies in slot p % length; for T = 1, and a window no longer than that.
    """
    n_queries = positions.shape[1]
    if window is None or window >= length:
        if n_queries == length:
            return None
        if n_queries > 1 and len(positions) == 1 and positions.is_cuda:
            from torch.nn.attention.bias import causal_lower_right  # a second to import, and for CUDA only

            return causal_lower_right(n_queries, length)
    slots = torch.arange(length, device=positions.device)
    if ring:
        assert window is not None
        ages = (positions[:, None, :, None] - slots) % length  # of the tokens in the slots; the query's own is 0
        return (ages < window) & (ages <= positions[:, None, :, None])
    visible = slots <= positions[:, None, :, None]  # [B, 1, T, length]
    if window is not None:
        visible &= slots > positions[:, None, :, None] - window
    return visible


def _lead_reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Shared]:
    k, v = _for_each_query_head(k.to(q.dtype), q.shape[1]), v.to(q.dtype)
    scores = q @ k.mT / q.shape[-1] ** 0.5  # [B, H, T, S]
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = scores.float().softmax(dim=-1).type_as(q)
    return weights @ _for_each_query_head(v, q.shape[1]), weights


def _follow_reference(weights: Tensor, v: Tensor, head_map: HeadMap | None) -> Tensor:
    if head_map is not None:
        weights = weights[:, head_map.heads]
    return weights @ _for_each_query_head(v.to(weights.dtype), weights.shape[1])


def _lead_torch(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Shared]:
    k, v = k.to(q.dtype), v.to(q.dtype)
    if q.shape[2] > 1:
        return _fused(q, k, v, mask), Queries(q, k, mask)
    scores = _grouped(q, k) @ k.mT / q.shape[-1] ** 0.5  # [B, Hkv, H/Hkv, S]
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    weights = scores.float().softmax(dim=-1).type_as(q)
    return (weights @ v).view_as(q), weights.flatten(1, 2).unsqueeze(2)


def _follow_torch(shared: Tensor | Queries, v: Tensor, head_map: HeadMap | None) -> Tensor:
    if isinstance(shared, Tensor):
        weights = shared if head_map is None else shared[:, head_map.heads]  # [B, H, 1, S]
        return (_grouped(weights, v) @ v.to(weights.dtype)).flatten(1, 2).unsqueeze(2)  # [B, H, 1, D]
    q, k, mask = shared
    v = v.to(q.dtype)
    if head_map is not None:
        q = q[:, head_map.heads]
        if head_map.keys is not None:
            k = k[:, head_map.keys]
        else:  # query heads of one group meet several key heads: keys and values are laid out one a query head
            n_heads = q.shape[1]
            k = k[:, head_map.heads // (n_heads // k.shape[1])]
            v = _for_each_query_head(v, n_heads)
    return _fused(q, k, v, mask)


def _fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    grouped = q.shape[1] != k.shape[1]
    if grouped and q.is_cuda and type(mask) is Tensor:  # no fused kernel there takes both groups and such a mask
        k, v, grouped = _for_each_query_head(k, q.shape[1]), _for_each_query_head(v, q.shape[1]), False
    attend = partial(F.scaled_dot_product_attention, key=k, value=v, is_causal=mask is None, enable_gqa=grouped)
    n_rows = max(MAX_MASK_ELEMENTS // k.shape[2], 1)
    if q.is_cuda or mask is None or q.shape[2] <= n_rows:
        return attend(q, attn_mask=mask)
    parts = zip(q.split(n_rows, dim=2), mask.split(n_rows, dim=2), strict=True)
    return torch.cat([attend(rows, attn_mask=seen) for rows, seen in parts], dim=2)


def _grouped(x: Tensor, kv: Tensor) -> Tensor:
    """[B, H, 1, N] → [B, Hkv, H/Hkv, N]: the query heads of each key and value head together."""
    return x.reshape(x.shape[0], kv.shape[1], -1, x.shape[-1])


def _for_each_query_head(kv: Tensor, n_heads: int) -> Tensor:
    """[B, Hkv, S, D] → [B, H, S, D]."""
    return kv.repeat_interleave(n_heads // kv.shape[1], dim=1)


REFERENCE = AttentionBackend("reference", visible_slots, _lead_reference, _follow_reference)
TORCH = AttentionBackend("torch", visible_slots, _lead_torch, _follow_torch)
