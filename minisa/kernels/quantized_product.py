"""x @ weight.T for a quantized weight and few rows of x, in Triton: reads the blocks as they are stored, once.

For one row every block of 32 weights is multiplied by its part of x and summed before its scale comes in, so that a
weight takes a conversion and a multiply-add. For several rows tiles are widened and multiplied as matrices.

Formats as in quantize.py: int8 quants [N, K], or nibbles two a byte [N, K / 2], the low ones the first half of the 32
columns of a block; scales and minimums fp16 [N, K / 32].
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from minisa.kernels.common import INTERPRETED, LEAST_ROWS, product

MOST_ROWS = 64  # beyond, the weight is better dequantized once

_CONFIGS = [
    triton.Config({"BLOCK_N": n, "BLOCKS": blocks}, num_warps=warps)
    for n, blocks, warps in (
        (16, 8, 4),
        (4, 16, 4),
        (4, 32, 4),
        (8, 16, 4),
        (8, 32, 8),
        (16, 4, 2),
        (32, 4, 4),
        (64, 2, 4),
    )
]  # BLOCK_N rows of the weight and BLOCKS blocks of each at a time


@triton.autotune(_CONFIGS[:1] if INTERPRETED.value else _CONFIGS, key=["n", "k", "ROWS", "INT4"])
@triton.jit
def _multiply(
    x, quants, scales, minimums, out, n_rows, n, k,
    ROWS: tl.constexpr, INT4: tl.constexpr, BLOCK_N: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """ROWS: 1, or n_rows rounded up to what a matrix product takes."""
    at_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_n = at_n < n
    n_blocks = k // 32
    offset = at_n.to(tl.int64)
    half = tl.arange(0, 16)
    if ROWS == 1:
        sums = tl.zeros([BLOCK_N, BLOCKS], tl.float32)
    else:
        sums = tl.zeros([BLOCK_N, ROWS], tl.float32)
    for start in range(0, n_blocks, BLOCKS):
        block = start + tl.arange(0, BLOCKS)
        is_block = block < n_blocks
        here = is_n[:, None] & is_block
        scale = tl.load(scales + offset[:, None] * n_blocks + block, mask=here, other=0).to(tl.float32)
        if INT4:
            minimum = tl.load(minimums + offset[:, None] * n_blocks + block, mask=here, other=0).to(tl.float32)
            pairs = tl.load(
                quants + offset[:, None, None] * (k // 2) + block[:, None] * 16 + half, mask=here[:, :, None], other=0
            )  # [BLOCK_N, BLOCKS, 16]
            low, high = (pairs & 15).to(tl.float32), (pairs >> 4).to(tl.float32)
        else:
            first = quants + offset[:, None, None] * k + block[:, None] * 32 + half
            low = tl.load(first, mask=here[:, :, None], other=0).to(tl.float32)
            high = tl.load(first + 16, mask=here[:, :, None], other=0).to(tl.float32)
        if ROWS == 1:
            columns = block[:, None] * 32 + half  # [BLOCKS, 16]
            x_low = tl.load(x + columns, mask=is_block[:, None], other=0).to(tl.float32)
            x_high = tl.load(x + columns + 16, mask=is_block[:, None], other=0).to(tl.float32)
            sums += scale * tl.sum(low * x_low + high * x_high, 2)
            if INT4:
                sums += minimum * tl.sum(x_low + x_high, 1)
        else:
            row = tl.arange(0, ROWS)
            low, high = low * scale[:, :, None], high * scale[:, :, None]
            if INT4:
                low, high = low + minimum[:, :, None], high + minimum[:, :, None]
            columns = tl.reshape(block[:, None] * 32 + half, [BLOCKS * 16])
            is_x = (row < n_rows)[:, None] & (columns < k)
            x_low = tl.load(x + row[:, None] * k + columns, mask=is_x, other=0)  # [ROWS, BLOCKS * 16]
            x_high = tl.load(x + row[:, None] * k + columns + 16, mask=is_x, other=0)
            sums += product(tl.reshape(low, [BLOCK_N, BLOCKS * 16]).to(x_low.dtype), tl.trans(x_low))
            sums += product(tl.reshape(high, [BLOCK_N, BLOCKS * 16]).to(x_low.dtype), tl.trans(x_high))
    if ROWS == 1:
        tl.store(out + at_n, tl.sum(sums, 1).to(out.dtype.element_ty), mask=is_n)
    else:
        row = tl.arange(0, ROWS)
        to = out + row * n + at_n[:, None]
        tl.store(to, sums.to(out.dtype.element_ty), mask=is_n[:, None] & (row < n_rows))


@torch.library.custom_op("minisa::quantized_product", mutates_args=())
def quantized_product(x: Tensor, quants: Tensor, scales: Tensor, minimums: Tensor | None) -> Tensor:
    """x [..., K], at most MOST_ROWS rows, times a weight [N, K] transposed: [..., N] in x's dtype.

    quants: int8 [N, K], or for int4 uint8 [N, K / 2], with minimums.
    """
    n, k = len(quants), x.shape[-1]
    rows = x.reshape(-1, k).contiguous()
    out = torch.empty(len(rows), n, device=x.device, dtype=x.dtype)
    padded = 1 if len(rows) == 1 else max(LEAST_ROWS, triton.next_power_of_2(len(rows)))
    _multiply[lambda sizes: (triton.cdiv(n, sizes["BLOCK_N"]),)](
        rows, quants, scales, scales if minimums is None else minimums, out, len(rows), n, k,
        ROWS=padded, INT4=minimums is not None,
    )  # fmt: skip
    return out.view(*x.shape[:-1], n)


@quantized_product.register_fake
def _(x: Tensor, quants: Tensor, scales: Tensor, minimums: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(quants))
