"""x @ weight.T for a quantized weight and one row of x, in Triton: reads the blocks as they are stored, once.

A program multiplies one row of the weight, each thread a block at a time, so that threads exchange nothing until the
final sum. No quant is converted to a float: its bits are placed at the top of a mantissa, which makes it
1 + q / 2^bits, and one multiply-add turns that into a weight.

Formats as in quantize.py: int8 quants [N, K], or nibbles two a byte [N, K / 2], the low ones the first half of the 32
columns of a block; scales and minimums fp16 [N, K / 32].
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from minisa.quantize import QuantizedLinear
from minisa.runners.kernels import INTERPRETED

# A warp or a few for a row of the weight; the interpreter takes as long for many rows as for one.
_CONFIGS = [triton.Config({"BLOCK_N": 1, "BLOCKS": 32 * warps}, num_warps=warps) for warps in (1, 2, 4)]
if INTERPRETED.value:
    _CONFIGS = [triton.Config({"BLOCK_N": 64, "BLOCKS": 32})]


@triton.jit
def _load_block(quants, scales, minimums, at, here, BITS: tl.constexpr):
    """Blocks `at` [BLOCK_N, BLOCKS]: their quants as int64 words, two (and again) or four; scales and minimums."""
    two = tl.arange(0, 2)
    a, b = tl.split(tl.load(quants + at[:, :, None] * (BITS // 2) + two, mask=here[:, :, None], other=0))
    c = a
    d = b
    if BITS == 8:
        c, d = tl.split(tl.load(quants + at[:, :, None] * 4 + 2 + two, mask=here[:, :, None], other=0))
    at = tl.max_contiguous(at, [1, 1])  # else a thread would load several scales, which are narrow, at once
    scale = tl.load(scales + at, mask=here, other=0)
    minimum = tl.load(minimums + at, mask=here, other=0) if BITS == 4 else scale
    return a, b, c, d, scale, minimum


@triton.autotune(_CONFIGS, key=["n", "n_blocks", "BITS"])
@triton.jit
def _multiply_row(
    x, quants, scales, minimums, out, raised, n,
    n_blocks: tl.constexpr, BITS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """x int64 [16, n_blocks], two columns of a block in fp32 each; quants int64 [n, n_blocks · BITS / 2].

    raised: the bits of 1; for int8 the sign bit of a quant at its place is in them, which makes q + 128 of q. Blocks
    are loaded while those before them are multiplied.
    """
    TOP: tl.constexpr = 23 - BITS
    at_n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
    is_n, row = at_n < n, at_n.to(tl.int64) * n_blocks
    block = tl.arange(0, BLOCKS)
    a, b, c, d, scale, minimum = _load_block(quants, scales, minimums, row + block, is_n & (block < n_blocks), BITS)
    even = tl.zeros([BLOCK_N, BLOCKS], tl.float32)
    odd = tl.zeros([BLOCK_N, BLOCKS], tl.float32)
    for start in range(0, n_blocks, BLOCKS):
        block = start + tl.arange(0, BLOCKS)
        after = block + BLOCKS
        there = is_n & (after < n_blocks)
        a1, b1, c1, d1, scale1, minimum1 = _load_block(quants, scales, minimums, row + after, there, BITS)
        step = scale.to(tl.float32) * (1 << BITS)
        base = (minimum.to(tl.float32) if BITS == 4 else -128 * scale.to(tl.float32)) - step
        for pair in tl.static_range(16):
            both = tl.load(x + pair * n_blocks + block, mask=block < n_blocks, other=0)
            x_even = both.to(tl.int32).to(tl.float32, bitcast=True)
            x_odd = (both >> 32).to(tl.int32).to(tl.float32, bitcast=True)
            if BITS == 4:
                word = a if pair % 8 < 4 else b
                first = pair % 2 * 16 + pair // 8 * 4
            else:
                word = a if pair < 4 else (b if pair < 8 else (c if pair < 12 else d))
                first = pair % 2 * 16
            bits = (word >> (32 * (pair % 4 // 2))).to(tl.int32)
            even = tl.fma(_weight(bits, first, raised, step, base, TOP), x_even, even)
            odd = tl.fma(_weight(bits, first + 8, raised, step, base, TOP), x_odd, odd)
        a, b, c, d, scale, minimum = a1, b1, c1, d1, scale1, minimum1
    tl.store(out + at_n, tl.sum(even + odd, 1, keep_dims=True), mask=is_n)


@triton.jit
def _weight(bits, at: tl.constexpr, raised, step, base, TOP: tl.constexpr):
    """The quant at bit `at`, as a weight."""
    at_top = bits >> (at - TOP) if at > TOP else bits << (TOP - at)
    mask: tl.constexpr = 0x7FFFFF ^ ((1 << TOP) - 1)
    return tl.fma(((at_top & mask) ^ raised).to(tl.float32, bitcast=True), step, base)


def use_kernels(model: nn.Module) -> None:
    """Let the quantized matrices of a model multiply single rows in Triton; int4 is packed two to a byte for it."""
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module.quants = module.blocks.packed().quants
            module.multiply_row = quantized_product


def quantized_product(x: Tensor, quants: Tensor, scales: Tensor, minimums: Tensor | None) -> Tensor:
    """x [..., K], one row, times a weight [N, K] transposed: [..., N] in x's dtype.

    quants: int8 [N, K], or for int4 uint8 [N, K / 2], with minimums.
    """
    # Where x is computed by compiled code, so is this, in the same kernel.
    pairs = x.reshape(-1, 16, 2).transpose(0, 1).float().contiguous()
    return multiply_row(pairs, quants, scales, minimums).to(x.dtype).view(*x.shape[:-1], -1)


@torch.library.custom_op("minisa::multiply_row", mutates_args=())
def multiply_row(x: Tensor, quants: Tensor, scales: Tensor, minimums: Tensor | None) -> Tensor:
    """As quantized_product, for x whose columns 32 b + 2 i + j are x[i, b, j], fp32 [16, K / 32, 2]: [N] fp32."""
    n, n_blocks = scales.shape
    out = x.new_empty(n)
    int8 = minimums is None
    with torch.cuda.device_of(x):  # Triton launches on the current device
        _multiply_row[lambda sizes: (triton.cdiv(n, sizes["BLOCK_N"]),)](
            x.view(torch.int64), quants.view(torch.int64), scales, scales if minimums is None else minimums, out,
            0x3FC00000 if int8 else 0x3F800000, n, n_blocks, BITS=8 if int8 else 4,
        )  # fmt: skip
    return out


@multiply_row.register_fake
def _(x: Tensor, quants: Tensor, scales: Tensor, minimums: Tensor | None) -> Tensor:
    return x.new_empty(len(scales))
