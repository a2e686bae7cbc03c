"""What the kernels share: whether they are interpreted."""

from __future__ import annotations

import os

import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
