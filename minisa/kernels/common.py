"""What the kernels share."""

from __future__ import annotations

import os

import triton
import triton.language as tl

LEAST_ROWS = 16  # of a matrix product in Triton: fewer are padded
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def product(a, b):
    """a · b in fp32; the interpreter does not multiply bf16, and rounded operands widened give the same."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")
