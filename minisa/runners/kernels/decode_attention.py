"""Attention of a query a row, or a few, in Triton: leaders leave their scores behind, followers reuse them.

Flash decoding (Dao, Haziza, Massa and Sizov, 2023) with Shared Attention (arXiv 2407.12866) in it. The slots of a row
are split into parts, so that a single row keeps the whole device busy; a program handles one part for all the query
heads of one key and value head, and so reads every key and value once.

    lead     for each block of slots:  s = q·Kᵀ/√d            → scores[row, head, slot]
                                       running maximum, sum of e^(s - maximum), and of e^(s - maximum)·V
    merge    for each head: the parts put together            → output, and the log-sum-exp of the row
    follow   for each block of slots:  p = e^(score - lse)    ← the leader's, through the head map
                                       sum of p·V_own: no key, no maximum and no sum to find
    merge    for each head: the parts added up                → output

How many slots a row has is read on the device, from its position: one launch, and so one captured graph, serves every
length, and stops at the row's own. Scores and the log-sum-exp are fp32 and to the base 2.

Several queries of a row, which verify guesses, are so many rows to the kernels, with the same keys and values.

Shapes: q [B, T, H, D]; keys, values [B, Hkv, S, D], slices of a cache; positions [B, T]; scores [B · T, H, S]; lse
[B · T, H].
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from minisa.attention import TORCH, AttentionBackend, HeadMap, Shared, Visible
from minisa.runners.kernels import INTERPRETED

BLOCK = 64  # slots a program reads at once; half of it in fp32, to fit the shared memory of every card
MIN_ROWS = 16  # of a matrix product in Triton; fewer are padded
MAX_PARTS = 64
MAX_QUERIES = 8  # a row; more of them are faster as one matrix product, which PyTorch's fused attention is
PROGRAMS_PER_PROCESSOR = 2  # a row's slots are split into parts until there are so many programs


class Rows(NamedTuple):
    """What decoding queries see: the slots up to their positions [B, T], or the last `window` of them.

    ring: the slots, where position p lies in slot p % ring; else 0.
    """

    positions: Tensor
    window: int | None
    ring: int


class SharedScores(NamedTuple):
    """What a leader leaves: scores [B · T, H, S] of the slots its queries saw, their log-sum-exp [B · T, H], and which
    they are.

    dtype: of the output.
    """

    scores: Tensor
    lse: Tensor
    rows: Rows
    dtype: torch.dtype


@triton.jit
def _product(a, b):
    """a · b in fp32; the interpreter does not multiply bf16, and rounded operands widened give the same."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _slots_of(position, part, n_parts, WINDOW: tl.constexpr, BLOCK: tl.constexpr):
    """The positions [first, last) of one part of a row, in whole blocks."""
    start = 0
    if WINDOW:
        start = tl.maximum(position + 1 - WINDOW, 0)
    size = tl.cdiv(tl.cdiv(position + 1 - start, BLOCK), n_parts) * BLOCK
    first = start + part * size
    return first, tl.minimum(first + size, position + 1)


@triton.jit
def _load(tensor, offsets, mask, dtype: tl.constexpr, FP8: tl.constexpr):
    """Numbers of a cache in dtype. fp8 (e4m3) comes as bytes: all but its exponent's bias is fp16's own layout."""
    x = tl.load(tensor + offsets, mask=mask, other=0)
    if FP8:
        bits = x.to(tl.uint16)
        half = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True)
        return (half.to(tl.float32) * 256.0).to(dtype)
    return x.to(dtype)


@triton.jit
def _lead(
    q, keys, values, positions, scores, partial, maxima, sums, scale, row_stride, head_stride, length,
    GROUP: tl.constexpr, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, DIMS: tl.constexpr, QUERIES: tl.constexpr,
    WINDOW: tl.constexpr, RING: tl.constexpr, FP8: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, kv_head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    n_kv_heads, n_parts = tl.num_programs(1), tl.num_programs(2)
    first, last = _slots_of(tl.load(positions + row), part, n_parts, WINDOW, BLOCK)
    slots, dims, group = tl.arange(0, BLOCK), tl.arange(0, DIMS), tl.arange(0, ROWS)
    heads = (row * n_kv_heads + kv_head) * GROUP + group  # of all rows
    is_head, is_dim = group < GROUP, dims < HEAD_DIM
    query = tl.load(q + heads[:, None] * HEAD_DIM + dims, mask=is_head[:, None] & is_dim, other=0)  # [ROWS, DIMS]
    memory = (row // QUERIES).to(tl.int64) * row_stride + kv_head.to(tl.int64) * head_stride
    scores_of = scores + heads.to(tl.int64)[:, None] * length

    most = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, DIMS], tl.float32)
    for block in range(first, last, BLOCK):
        at = block + slots
        seen = at < last
        slot = at % RING if RING else at
        here = memory + slot.to(tl.int64)[:, None] * HEAD_DIM + dims  # [BLOCK, DIMS]
        there = seen[:, None] & is_dim
        k = _load(keys, here, there, query.dtype, FP8)
        s = _product(query, tl.trans(k)) * scale
        s = tl.where(seen, s, float("-inf"))
        tl.store(scores_of + slot, s, mask=is_head[:, None] & seen)
        higher = tl.maximum(most, tl.max(s, 1))
        p = tl.exp2(s - higher[:, None])
        shrink = tl.exp2(most - higher)
        total = total * shrink + tl.sum(p, 1)
        v = _load(values, here, there, query.dtype, FP8)
        mixed = mixed * shrink[:, None] + _product(p.to(v.dtype), v)
        most = higher
    parts = heads.to(tl.int64) * n_parts + part
    tl.store(maxima + parts, most, mask=is_head)
    tl.store(sums + parts, total, mask=is_head)
    tl.store(partial + parts[:, None] * HEAD_DIM + dims, mixed, mask=is_head[:, None] & is_dim)


@triton.jit
def _follow(
    scores, lse, head_map, values, positions, partial, row_stride, head_stride, length,
    GROUP: tl.constexpr, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, DIMS: tl.constexpr, QUERIES: tl.constexpr,
    MAPPED: tl.constexpr, WINDOW: tl.constexpr, RING: tl.constexpr, FP8: tl.constexpr, BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    row, kv_head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    n_kv_heads, n_parts = tl.num_programs(1), tl.num_programs(2)
    first, last = _slots_of(tl.load(positions + row), part, n_parts, WINDOW, BLOCK)
    slots, dims, group = tl.arange(0, BLOCK), tl.arange(0, DIMS), tl.arange(0, ROWS)
    is_head, is_dim = group < GROUP, dims < HEAD_DIM
    source = kv_head * GROUP + group  # the leader's heads
    if MAPPED:
        source = tl.load(head_map + source, mask=is_head, other=0).to(tl.int32)
    sources = row * n_kv_heads * GROUP + source
    base = tl.load(lse + sources, mask=is_head, other=0)
    memory = (row // QUERIES).to(tl.int64) * row_stride + kv_head.to(tl.int64) * head_stride
    scores_of = scores + sources.to(tl.int64)[:, None] * length

    mixed = tl.zeros([ROWS, DIMS], tl.float32)
    for block in range(first, last, BLOCK):
        at = block + slots
        seen = at < last
        slot = at % RING if RING else at
        s = tl.load(scores_of + slot, mask=is_head[:, None] & seen, other=float("-inf"))
        p = tl.exp2(s - base[:, None])
        here = memory + slot.to(tl.int64)[:, None] * HEAD_DIM + dims
        v = _load(values, here, seen[:, None] & is_dim, DTYPE, FP8)
        mixed += _product(p.to(v.dtype), v)
    heads = (row * n_kv_heads + kv_head) * GROUP + group
    parts = heads.to(tl.int64) * n_parts + part
    tl.store(partial + parts[:, None] * HEAD_DIM + dims, mixed, mask=is_head[:, None] & is_dim)


@triton.jit
def _merge(
    partial, maxima, sums, out, lse, n_parts,
    HEAD_DIM: tl.constexpr, DIMS: tl.constexpr, PARTS: tl.constexpr, NORMALIZED: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)
    parts, dims = tl.arange(0, PARTS), tl.arange(0, DIMS)
    is_part, is_dim = parts < n_parts, dims < HEAD_DIM
    at = head * n_parts + parts
    mixed = tl.load(partial + at[:, None] * HEAD_DIM + dims, mask=is_part[:, None] & is_dim, other=0)
    if not NORMALIZED:
        maximum = tl.load(maxima + at, mask=is_part, other=float("-inf"))
        most = tl.max(maximum, 0)
        share = tl.exp2(maximum - most)
        total = tl.sum(tl.load(sums + at, mask=is_part, other=0) * share, 0)
        mixed = mixed * (share / total)[:, None]
        tl.store(lse + head, most + tl.log2(total))
    tl.store(out + head * HEAD_DIM + dims, tl.sum(mixed, 0).to(out.dtype.element_ty), mask=is_dim)


def lead(q: Tensor, keys: Tensor, values: Tensor, visible: Visible) -> tuple[Tensor, Shared]:
    """q [B, H, T, D], keys and values [B, Hkv, S, D] → (output [B, H, T, D], what followers need).

    keys and values are fp32, fp16, bf16 or fp8 (e4m3), with whole slots of D numbers behind each other.
    """
    if not isinstance(visible, Rows):
        return TORCH.lead(q, keys, values, visible)
    by_row = q.transpose(1, 2).flatten(0, 1).contiguous()  # [B · T, H, D]
    heads = by_row.shape[:2]
    n_parts, partial, sizes = _launch(by_row, values, visible)
    scores, lse = _fp32(by_row, *heads, keys.shape[2]), _fp32(by_row, *heads)
    maxima, sums = _fp32(by_row, 2, *heads, n_parts)
    with torch.cuda.device_of(q):  # Triton launches on the current device
        _lead[heads[0], keys.shape[1], n_parts](
            by_row, _bytes(keys), _bytes(values), visible.positions, scores, partial, maxima, sums,
            math.log2(math.e) / q.shape[3] ** 0.5, keys.stride(0), keys.stride(1), keys.shape[2], **sizes,
        )  # fmt: skip
        out = _merged(by_row, partial, maxima, sums, lse)
    return _by_head(out, visible), SharedScores(scores, lse, visible, q.dtype)


def follow(shared: Shared, values: Tensor, head_map: HeadMap | None) -> Tensor:
    """The leader's weights on values [B, Hkv, S, D] → output [B, H, T, D]; head_map None is the identity."""
    if not isinstance(shared, SharedScores):
        return TORCH.follow(shared, values, head_map)
    scores, lse, rows, dtype = shared
    out = values.new_empty(*lse.shape, values.shape[3], dtype=dtype)
    n_parts, partial, sizes = _launch(out, values, rows)
    with torch.cuda.device_of(values):
        _follow[len(scores), values.shape[1], n_parts](
            scores, lse, lse if head_map is None else head_map.heads, _bytes(values), rows.positions, partial,
            values.stride(0), values.stride(1), scores.shape[2], MAPPED=head_map is not None,
            DTYPE=_TRITON_TYPES[dtype], **sizes,
        )  # fmt: skip
        return _by_head(_merged(out, partial, partial, partial, None), rows)


def _merged(like: Tensor, partial: Tensor, maxima: Tensor, sums: Tensor, lse: Tensor | None) -> Tensor:
    """Parts [R, H, n_parts, D] put together, [R, H, D]; lse None: they have the row's own log-sum-exp in them and only
    add up."""
    n_rows, n_heads, n_parts, head_dim = partial.shape
    out = torch.empty_like(like)
    _merge[n_rows * n_heads,](
        partial, maxima, sums, out, partial if lse is None else lse, n_parts, HEAD_DIM=head_dim,
        DIMS=triton.next_power_of_2(head_dim), PARTS=triton.next_power_of_2(n_parts), NORMALIZED=lse is None,
    )  # fmt: skip
    return out


def _fp32(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.float32)


def _by_head(out: Tensor, rows: Rows) -> Tensor:
    """[B · T, H, D] → [B, H, T, D]."""
    return out.unflatten(0, rows.positions.shape).transpose(1, 2)


def _launch(out: Tensor, kv: Tensor, rows: Rows) -> tuple[int, Tensor, dict[str, int]]:
    """How many parts a row is split into, room for what each makes of out [B · T, H, D], and a kernel's constants."""
    n_rows, n_heads, head_dim = out.shape
    n_kv_heads, length = kv.shape[1:3]
    if kv.stride()[2:] != (head_dim, 1):
        raise ValueError(f"the numbers of a slot must lie together: strides {kv.stride()} for head_dim {head_dim}")
    group = n_heads // n_kv_heads
    enough = -(-PROGRAMS_PER_PROCESSOR * _processors(out.device) // (n_rows * n_kv_heads))
    block = BLOCK if out.dtype.itemsize < 4 else BLOCK // 2
    n_parts = max(1, min(enough, MAX_PARTS, -(-length // block)))
    return (
        n_parts,
        _fp32(out, n_rows, n_heads, n_parts, head_dim),
        {
            "GROUP": group,
            "ROWS": max(MIN_ROWS, triton.next_power_of_2(group)),
            "HEAD_DIM": head_dim,
            "DIMS": triton.next_power_of_2(head_dim),
            "QUERIES": rows.positions.shape[1],
            "WINDOW": rows.window or 0,
            "RING": rows.ring,
            "FP8": kv.dtype == torch.float8_e4m3fn,
            "BLOCK": block,
        },
    )


@functools.cache
def _processors(device: torch.device) -> int:
    """Streaming multiprocessors; in the interpreter a few, so that rows are split there too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def _bytes(kv: Tensor) -> Tensor:
    """fp8 as bytes: not every card that Triton compiles for has instructions for it."""
    return kv.view(torch.uint8) if kv.dtype == torch.float8_e4m3fn else kv


_TRITON_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def _visible(positions: Tensor, length: int, window: int | None, ring: bool = False) -> Visible:
    if positions.shape[1] <= MAX_QUERIES:
        return Rows(positions.contiguous(), window, length if ring else 0)
    return TORCH.visible(positions, length, window)


KERNELS = AttentionBackend("kernels", _visible, lead, follow)
