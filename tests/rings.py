"""A model with a sliding window, on the ring that its cache is or on a cache that keeps every token."""

from __future__ import annotations

from typing import Any

from minisa.cache import StaticCache
from minisa.costs import SLACK
from minisa.engine import LLM
from minisa.runners.eager import TorchRunner
from minisa.sharing import SharingPlan
from tests.engines import byte_llm
from tests.models import build_model
from tests.tiny import tiny_config

WINDOW = 8
SLOTS = WINDOW + SLACK
CONTEXT = 3 * SLOTS + 5
WINDOWED = tiny_config(n_heads=4, n_kv_heads=2, sliding_window=WINDOW, max_seq_len=512)
WINDOWED_PLANS = {
    "none": SharingPlan.none(4),
    "head maps": SharingPlan.following(4, {2: 1, 3: 0}, {2: [3, 0, 0, 1]}),
}


def windowed_cache(plan: SharingPlan, *, max_seq_len: int = CONTEXT, **options: Any) -> StaticCache:
    return StaticCache.allocate(WINDOWED, plan, max_seq_len=max_seq_len, **options)


def windowed_llm(*, ring: bool = True) -> LLM:
    plan = WINDOWED_PLANS["head maps"]
    return byte_llm(windowed_cache(plan, batch=4, ring=ring), TorchRunner(build_model(WINDOWED, plan)))
