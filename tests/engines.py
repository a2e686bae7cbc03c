"""A tiny model under everything that executes a step, and ways to choose its tokens."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch

from minisa.cache import StaticCache
from minisa.dialog import DIALOGS
from minisa.engine import LLM
from minisa.native.build import open_library
from minisa.native.runner import NativeRunner
from minisa.sharing import SharingPlan
from tests.models import SIX_LAYERS, build_model
from tests.test_generate import ByteTokenizer, llm_of
from tests.tiny import tiny_config

ROWS = 3
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 1.0},
    "everything": {
        "temperature": 0.8, "top_k": 40, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.3,
    },
}  # fmt: skip


def eager(**options: Any) -> LLM:
    return llm_of(max_seq_len=64, max_batch=ROWS, **options)


def queueing() -> LLM:
    llm = eager()
    llm.runner.asynchronous = True  # type: ignore[misc]
    return llm


def narrow(dtype: torch.dtype) -> LLM:
    llm = eager()
    llm.cache = StaticCache.allocate(SIX_LAYERS, llm.plan, batch=ROWS, max_seq_len=64, dtype=dtype)
    return llm


def graphs() -> LLM:
    pytest.importorskip("triton", reason='needs pip install "minisa[test]", on Linux')
    from tests.test_graphs import Recorder, graph_llm

    return graph_llm(Recorder(), max_seq_len=64)


def native() -> LLM:
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    library = open_library(wait=True)
    assert library is not None
    config = tiny_config(n_layers=6, n_heads=2, n_kv_heads=1, head_dim=32, hidden_dim=64)
    plan = SharingPlan.following(6, {2: 1, 3: 1, 5: 4}, {2: [1, 0], 5: [0, 0]})
    model = build_model(config, plan)
    cache = StaticCache.allocate(config, plan, batch=ROWS, max_seq_len=64)
    llm = LLM(model, ByteTokenizer(), lambda: DIALOGS["raw"], cache, compile=False)  # type: ignore[arg-type]
    llm.runner = NativeRunner(model, library, n_threads=1)
    return llm


ENGINES: dict[str, Callable[[], LLM]] = {
    "eager": eager,
    "queueing": queueing,
    "graphs": graphs,
    "C++ step": native,
    "bf16 cache": lambda: narrow(torch.bfloat16),
    "fp8 cache": lambda: narrow(torch.float8_e4m3fn),
}
