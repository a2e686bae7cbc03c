"""Triton kernels for the steps that read memory: attention of few queries a row, and quantized matrices times one row.

Imported only where Triton is installed and a device (or its interpreter, TRITON_INTERPRET=1) runs it.
"""

import os

import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
