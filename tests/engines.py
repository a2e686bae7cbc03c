"""A tiny model whose tokens are bytes under everything that executes a step, and ways to choose its tokens."""

from __future__ import annotations

import codecs
import shutil
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import pytest
import torch

from minisa.cache import StaticCache
from minisa.config import ModelConfig
from minisa.engine import LLM
from minisa.generation.row import Chunk
from minisa.model import Transformer
from minisa.runners.graphs import WARM_UP, Body, CudaGraphs, GraphRunner
from minisa.runners.native.build import open_library
from minisa.runners.native.runner import NativeRunner
from minisa.sharing import SharingPlan
from minisa.text.chat import find_template
from tests.models import PLANS, SIX_LAYERS, build_model
from tests.tiny import tiny_config

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # of kernels and graphs
PROMPTS = ["a", "the second row", "row three is by far the longest of them", "4th"]
ROWS = 3
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 1.0},
    "everything": {
        "temperature": 0.8, "top_k": 40, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.3,
    },
}  # fmt: skip


class ByteStream:
    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token: int) -> str:
        return self._decoder.decode(bytes([token]))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class ByteTokenizer:
    """One token a byte: the part of Tokenizer's interface that generation uses."""

    bos_id = None
    add_bos = False
    bos_ids: ClassVar[list[int]] = []
    eos_ids: frozenset[int] = frozenset()
    special: ClassVar[dict[str, int]] = {}
    named: ClassVar[dict[str, str]] = {}

    def encode_with_special(self, text: str, **_: Any) -> list[int]:
        return self.encode(text)

    def split_at_special(self, text: str) -> list[str]:
        return [text]

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode("utf-8", "replace")

    def stream(self, *, mid_text: bool) -> ByteStream:
        return ByteStream()


def byte_llm(model: Transformer, cache: StaticCache, **options: Any) -> LLM:
    tokenizer: Any = ByteTokenizer()
    return LLM(model, tokenizer, lambda: find_template("", tokenizer, "raw"), cache, **options)


def llm_of(
    plan: SharingPlan = PLANS["head maps"],
    max_seq_len: int = 96,
    max_batch: int = 4,
    model: Transformer | None = None,
    **options: Any,
) -> LLM:
    cache = StaticCache.allocate(SIX_LAYERS, plan, batch=max_batch, max_seq_len=max_seq_len)
    return byte_llm(model or build_model(SIX_LAYERS, plan), cache, **options)


def tokens_of(chunks: Iterable[Chunk], row: int = 0) -> list[int]:
    return [chunk.token for chunk in chunks if chunk.row == row]


def text_of(chunks: Iterable[Chunk], row: int = 0) -> str:
    return "".join(chunk.text for chunk in chunks if chunk.row == row)


class Recorder:
    """Counts what is recorded; on a GPU a real graph, else the body itself, warmed up as CudaGraphs does it."""

    def __init__(self) -> None:
        self.recorded = 0
        self._graphs = CudaGraphs(DEVICE) if DEVICE.type == "cuda" else None

    def __call__(self, body: Body) -> Body:
        self.recorded += 1
        if self._graphs is not None:
            return self._graphs(body)
        for _ in range(WARM_UP):
            body()
        return body


def graph_llm(
    recorder: Recorder,
    plan: SharingPlan = PLANS["head maps"],
    max_seq_len: int = 96,
    backend: str = "torch",
    config: ModelConfig = SIX_LAYERS,
) -> LLM:
    """The torch backend is as right in a graph as the kernels, which Triton's interpreter takes a hundred times longer
    for."""
    model = build_model(config, plan, backend).to(DEVICE)
    cache = StaticCache.allocate(config, plan, batch=4, max_seq_len=max_seq_len, device=DEVICE)
    llm = byte_llm(model, cache, compile=False)
    llm.runner = GraphRunner(model, compile=False, record=recorder)
    return llm


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
    llm = byte_llm(model, cache, compile=False)
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
