"""What is measured: a Contender prefills and decodes. Here minisa itself; the peers are beside it."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from minisa.benchmark.synthetic import random_checkpoint, random_llm
from minisa.checkpoint import load_weights, open_checkpoint
from minisa.config import ModelConfig
from minisa.device import begin_reading, peak_memory, synchronize
from minisa.engine import LLM, load
from minisa.generation.sampling import Chooser
from minisa.model import Transformer
from minisa.sharing import SharingPlan

LEAD_IN = 2  # untimed decode steps: the turn before has emptied the processor's caches


@dataclass(frozen=True, slots=True)
class Opening:
    """How a configuration is loaded: the options of `load`, the CPU threads, and cache slots a row as `context`.

    path: the checkpoint; None for random weights of config's shape.
    """

    path: Path | None
    config: ModelConfig
    plan: SharingPlan
    device: torch.device
    context: int
    dtype: str = "auto"
    kv_dtype: str = "auto"
    quantize: str | None = None
    compile: bool | None = None
    batch: int = 1
    threads: int = 1

    def llm(self) -> LLM:
        """minisa with these weights."""
        given = {"max_seq_len": self.context, "max_batch": self.batch, "dtype": self.dtype, "kv_dtype": self.kv_dtype}
        options = given | {"quantize": self.quantize, "compile": self.compile}
        if self.path is None:
            return random_llm(self.config, self.plan, device=self.device, **options)  # type: ignore[arg-type]
        return load(self.path, sa=self.plan, device=str(self.device), **options)  # type: ignore[arg-type]

    def weights(self, dtype: torch.dtype) -> Transformer:
        """The weights alone, without sharing or quantization: what a peer is given."""
        with torch.device("meta"):
            transformer = Transformer(self.config, SharingPlan.none(self.config.n_layers))
        checkpoint = random_checkpoint(self.config) if self.path is None else open_checkpoint(self.path)
        load_weights(transformer, checkpoint, device=self.device, dtype=dtype)
        return transformer


@dataclass(frozen=True, slots=True)
class Facts:
    """What a configuration says of itself. None where it cannot be told.

    dtype: what is computed in. memory_before, peak_memory: bytes of its process before loading (0 on a GPU) and at the
    most so far. kv_bytes: of the storage allocated for keys and values. detail: what runs it.
    """

    weight_bytes: int
    dtype: torch.dtype
    kv_dtype: torch.dtype
    memory_before: int
    peak_memory: int
    load_seconds: float | None = None
    kv_bytes: int | None = None
    detail: str = ""


class Contender(ABC):
    """One configuration, open. Lengths are in tokens, times in seconds; every method returns when its work is done."""

    filled = 0  # tokens that every row's context holds

    @abstractmethod
    def facts(self) -> Facts:
        """What it is like by now."""

    @abstractmethod
    def feed(self, tokens: Sequence[int], start: int, row: int = 0) -> int:
        """Feed a row tokens from position start on, after those already there; the greedy next token."""

    @abstractmethod
    def decode(self, context: int, steps: int) -> list[float]:
        """Times of decode steps, one token a row, the first after `context` tokens; `fill` came before."""

    def prefill(self, tokens: Sequence[int]) -> float:
        """Time to feed one row a prompt, from an empty context to its first token."""
        self.filled = 0
        began = time.perf_counter()
        self.feed(tokens, 0)
        return time.perf_counter() - began

    def fill(self, tokens: Sequence[int], batch: int) -> None:
        """Let every row's context be `tokens`. Each call brings a longer one, which begins with the one before."""
        if len(tokens) > self.filled:
            for row in range(batch):
                self.feed(tokens[self.filled :], self.filled, row)
            self.filled = len(tokens)

    def greedy(self, prompt: Sequence[int], n_tokens: int) -> list[int]:
        """The greedy continuation of a prompt."""
        self.filled = 0
        chosen = [self.feed(prompt, 0)]
        while len(chosen) < n_tokens:
            chosen.append(self.feed(chosen[-1:], len(prompt) + len(chosen) - 1))
        return chosen


class Minisa(Contender):
    """minisa, with or without Shared Attention.

    Slots behind a context keep what a longer one or a decode left there: no step looks past its own position, and what
    decoding overwrites in a ring takes as long to read.
    """

    def __init__(self, opening: Opening) -> None:
        torch.set_num_threads(opening.threads)
        self._memory_before = peak_memory(opening.device)
        began = time.perf_counter()
        self.llm = opening.llm()
        self._load_seconds = time.perf_counter() - began

    def facts(self) -> Facts:
        return Facts(
            weight_bytes=self.llm.weight_bytes,
            dtype=self.llm.dtype,
            kv_dtype=self.llm.cache.values.dtype,
            memory_before=self._memory_before,
            peak_memory=peak_memory(self.llm.device),
            load_seconds=self._load_seconds,
            kv_bytes=self.llm.cache.bytes(),
            detail=self.llm.runner.name,
        )

    @torch.inference_mode()
    def feed(self, tokens: Sequence[int], start: int, row: int = 0) -> int:
        ids, cache = torch.tensor([tokens], device=self.llm.device), self.llm.cache.view(rows=slice(row, row + 1))
        return int(self.llm.runner.prefill(ids, start, cache).argmax())

    @torch.inference_mode()
    def decode(self, context: int, steps: int) -> list[float]:
        for _ in range(LEAD_IN):
            self._run(context, 1)
        return self._run(context, steps)

    def _run(self, context: int, steps: int) -> list[float]:
        """As generation does: each token is read, where possible with the next step queued already."""
        llm = self.llm
        step = llm.runner.stepper(llm.cache, Chooser.greedy(llm.cache.batch))
        tokens = torch.ones(llm.cache.batch, dtype=torch.int64, device=llm.device)
        positions = torch.full_like(tokens, context)
        synchronize(llm.device)
        times: list[float] = []
        began, queued = time.perf_counter(), False
        for i in range(1, steps + 1):
            if not queued:
                tokens, positions = step(tokens, positions, context + i)
            wait = begin_reading(tokens)
            if queued := llm.runner.asynchronous and i < steps:
                tokens, positions = step(tokens, positions, context + i + 1)
            wait()
            now = time.perf_counter()
            times.append(now - began)
            began = now
        return times
