"""x @ weight.T for a quantized weight and few rows of x, in Triton: reads the blocks as they are stored, once.

For one row no weight is converted: its bits are put into the mantissa of a float. Those of int4 go to the top of it,
which makes 1 + q / 16, and what that is too much by is taken back once a block. All that belongs to a block is in one
thread, so that threads meet at the end only. For several rows tiles are widened and multiplied as matrices.

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


def _configs(*sizes: tuple[int, int, int]) -> list[triton.Config]:
    """BLOCK_N rows of the weight and BLOCKS blocks of each at a time, by so many warps."""
    configs = [triton.Config({"BLOCK_N": n, "BLOCKS": blocks}, num_warps=warps) for n, blocks, warps in sizes]
    return configs[:1] if INTERPRETED.value else configs


@triton.autotune(
    _configs((8, 128, 4), (4, 128, 4), (8, 64, 2), (4, 64, 2), (8, 32, 1), (4, 32, 1), (16, 32, 1)),
    key=["n", "n_blocks", "BITS"],
)
@triton.jit
def _multiply_row(
    x, quants, scales, minimums, out, n, n_blocks,
    BITS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """x [32, n_blocks] fp32, the columns of a block below each other; quants [n, n_blocks · BITS / 2] int64."""
    at_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_n = at_n < n
    sums = tl.zeros([BLOCK_N, BLOCKS], tl.float32)
    for start in range(0, n_blocks, BLOCKS):
        block = start + tl.arange(0, BLOCKS)
        is_block = block < n_blocks
        here = is_n[:, None] & is_block
        # Left to itself, the compiler would give scales, which are narrow, to other threads than quants.
        at = tl.max_contiguous(at_n.to(tl.int64)[:, None] * n_blocks + block, [1, 1])
        scale = tl.load(scales + at, mask=here, other=0).to(tl.float32)
        found = tl.zeros([BLOCK_N, BLOCKS], tl.float32)
        sum_x = tl.zeros([BLOCKS], tl.float32)
        for word in tl.static_range(BITS // 2):
            both = tl.load(quants + at * (BITS // 2) + word, mask=here, other=0)
            for half in tl.static_range(2):
                bits = (both >> (32 * half)).to(tl.int32)
                for i in tl.static_range(32 // BITS):
                    if BITS == 4:
                        column = 8 * word + 4 * half + i // 2 + 16 * (i % 2)
                        at_top = bits >> (4 * i - 19) if i > 4 else bits << (19 - 4 * i)
                        q = ((at_top & 0x780000) | 0x3F800000).to(tl.float32, bitcast=True)
                    else:
                        column = 8 * word + 4 * half + i
                        raised = (((bits >> (8 * i)) ^ 0x80) & 0xFF) | 0x4B000000  # 2^23 + 128 + q
                        q = raised.to(tl.float32, bitcast=True) - 8388736.0
                    x_i = tl.load(x + column * n_blocks + block, mask=is_block, other=0)
                    sum_x += x_i
                    found += q * x_i
        if BITS == 4:
            minimum = tl.load(minimums + at, mask=here, other=0).to(tl.float32)
            sums += 16 * scale * (found - sum_x) + minimum * sum_x
        else:
            sums += scale * found
    tl.store(out + at_n, tl.sum(sums, 1), mask=is_n)


@triton.autotune(
    _configs((16, 8, 4), (4, 16, 4), (4, 32, 4), (8, 16, 4), (8, 32, 8), (16, 4, 2), (32, 4, 4), (64, 2, 4)),
    key=["n", "k", "ROWS", "INT4"],
)
@triton.jit
def _multiply_rows(
    x, quants, scales, minimums, out, n_rows, n, k,
    ROWS: tl.constexpr, INT4: tl.constexpr, BLOCK_N: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """ROWS: n_rows rounded up to what a matrix product takes."""
    at_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_n = at_n < n
    n_blocks = k // 32
    offset = at_n.to(tl.int64)
    half, row = tl.arange(0, 16), tl.arange(0, ROWS)
    sums = tl.zeros([BLOCK_N, ROWS], tl.float32)
    for start in range(0, n_blocks, BLOCKS):
        block = start + tl.arange(0, BLOCKS)
        is_block = block < n_blocks
        here = is_n[:, None] & is_block
        scale = tl.load(scales + offset[:, None] * n_blocks + block, mask=here, other=0).to(tl.float32)[:, :, None]
        if INT4:
            minimum = tl.load(minimums + offset[:, None] * n_blocks + block, mask=here, other=0).to(tl.float32)
            pairs = tl.load(
                quants + offset[:, None, None] * (k // 2) + block[:, None] * 16 + half, mask=here[:, :, None], other=0
            )  # [BLOCK_N, BLOCKS, 16]
            low = (pairs & 15).to(tl.float32) * scale + minimum[:, :, None]
            high = (pairs >> 4).to(tl.float32) * scale + minimum[:, :, None]
        else:
            first = quants + offset[:, None, None] * k + block[:, None] * 32 + half
            low = tl.load(first, mask=here[:, :, None], other=0).to(tl.float32) * scale
            high = tl.load(first + 16, mask=here[:, :, None], other=0).to(tl.float32) * scale
        columns = tl.reshape(block[:, None] * 32 + half, [BLOCKS * 16])
        is_x = (row < n_rows)[:, None] & (columns < k)
        x_low = tl.load(x + row[:, None] * k + columns, mask=is_x, other=0)  # [ROWS, BLOCKS * 16]
        x_high = tl.load(x + row[:, None] * k + columns + 16, mask=is_x, other=0)
        sums += product(tl.reshape(low, [BLOCK_N, BLOCKS * 16]).to(x_low.dtype), tl.trans(x_low))
        sums += product(tl.reshape(high, [BLOCK_N, BLOCKS * 16]).to(x_low.dtype), tl.trans(x_high))
    to = out + row * n + at_n[:, None]
    tl.store(to, sums.to(out.dtype.element_ty), mask=is_n[:, None] & (row < n_rows))


def quantized_product(x: Tensor, quants: Tensor, scales: Tensor, minimums: Tensor | None) -> Tensor:
    """x [..., K], at most MOST_ROWS rows, times a weight [N, K] transposed: [..., N] in x's dtype.

    quants: int8 [N, K], or for int4 uint8 [N, K / 2], with minimums.
    """
    if x.shape[:-1].numel() == 1:
        # Where x is computed by compiled code, so is this, in the same kernel.
        below = x.reshape(-1, 32).T.float().contiguous()
        return multiply_row(below, quants, scales, minimums).to(x.dtype).view(*x.shape[:-1], -1)
    return multiply_rows(x.reshape(-1, x.shape[-1]), quants, scales, minimums).view(*x.shape[:-1], -1)


@torch.library.custom_op("minisa::multiply_row", mutates_args=())
def multiply_row(x: Tensor, quants: Tensor, scales: Tensor, minimums: Tensor | None) -> Tensor:
    """As quantized_product, for one row whose columns 32 b + i are x[i, b], fp32 [32, K / 32]: [N] fp32."""
    n, n_blocks = scales.shape
    out = torch.empty(n, device=x.device)
    _multiply_row[lambda sizes: (triton.cdiv(n, sizes["BLOCK_N"]),)](
        x, quants.view(torch.int64), scales, scales if minimums is None else minimums, out, n, n_blocks,
        BITS=8 if minimums is None else 4,
    )  # fmt: skip
    return out


@multiply_row.register_fake
def _(x: Tensor, quants: Tensor, scales: Tensor, minimums: Tensor | None) -> Tensor:
    return x.new_empty(len(scales))


@torch.library.custom_op("minisa::multiply_rows", mutates_args=())
def multiply_rows(x: Tensor, quants: Tensor, scales: Tensor, minimums: Tensor | None) -> Tensor:
    """As quantized_product, for several rows [R, K]: [R, N] in x's dtype."""
    n, (n_rows, k) = len(scales), x.shape
    out = torch.empty(n_rows, n, device=x.device, dtype=x.dtype)
    _multiply_rows[lambda sizes: (triton.cdiv(n, sizes["BLOCK_N"]),)](
        x.contiguous(), quants, scales, scales if minimums is None else minimums, out, n_rows, n, k,
        ROWS=max(LEAST_ROWS, triton.next_power_of_2(n_rows)), INT4=minimums is not None,
    )  # fmt: skip
    return out


@multiply_rows.register_fake
def _(x: Tensor, quants: Tensor, scales: Tensor, minimums: Tensor | None) -> Tensor:
    return x.new_empty(len(x), len(scales))
