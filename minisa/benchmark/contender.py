"""What is measured: anything that prefills and decodes. Here minisa itself; the peers are beside it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from minisa.benchmark.measure import timed
from minisa.benchmark.synthetic import random_checkpoint, random_llm
from minisa.checkpoint import load_weights, open_checkpoint
from minisa.config import ModelConfig
from minisa.device import begin_reading, dtype_name, peak_memory, synchronize
from minisa.engine import LLM, load
from minisa.generation.sampling import Chooser
from minisa.model import Transformer
from minisa.sharing import SharingPlan

LEAD_IN = 2  # decode steps before those that count: the turn before has emptied the processor's caches


@dataclass(frozen=True, slots=True)
class Opening:
    """How a configuration is loaded. Everything is resolved: nothing in it depends on the process it is sent to.

    path: the checkpoint; None for random weights. context: cache slots a row.
    compile: None leaves the choice to the engine (a peer then may compile).
    """

    path: Path | None
    config: ModelConfig
    plan: SharingPlan
    device: torch.device
    dtype: torch.dtype
    context: int
    batch: int = 1
    threads: int = 1
    quantize: str | None = None
    kv_dtype: torch.dtype | None = None  # what keys and values are kept in; None for dtype
    compile: bool | None = None

    def llm(self) -> LLM:
        """minisa with these weights."""
        options: dict[str, Any] = {
            "max_seq_len": self.context,
            "max_batch": self.batch,
            "quantize": self.quantize,
            "compile": self.compile,
        }
        if self.path is None:
            options["kv_dtype"] = self.kv_dtype
            return random_llm(self.config, self.plan, device=self.device, dtype=self.dtype, **options)
        options["kv_dtype"] = dtype_name(self.kv_dtype or self.dtype)
        return load(self.path, sa=self.plan, device=str(self.device), dtype=dtype_name(self.dtype), **options)

    def weights(self, dtype: torch.dtype) -> Transformer:
        """The weights alone, in `dtype`, of plain attention: what a peer is given."""
        with torch.device("meta"):
            transformer = Transformer(self.config, SharingPlan.none(self.config.n_layers))
        checkpoint = random_checkpoint(self.config) if self.path is None else open_checkpoint(self.path)
        load_weights(transformer, checkpoint, device=self.device, dtype=dtype)
        return transformer


@dataclass(frozen=True, slots=True)
class Facts:
    """What a configuration says of itself once it is open. None: it cannot be told apart, or has no meaning there.

    memory_before: bytes its process had at its peak before anything was loaded (0 on a GPU).
    kv_bytes: of the storage allocated for keys and values. detail: what was chosen, for people.
    """

    weight_bytes: int
    memory_before: int
    kv_itemsize: int
    load_seconds: float | None = None
    kv_bytes: int | None = None
    detail: str = ""


class Contender(Protocol):
    """One configuration, open. All lengths are in tokens; all times in seconds; weights and cache stay put."""

    def facts(self) -> Facts:
        """What it is like, now that it is open."""

    def prefill(self, tokens: list[int]) -> float:
        """Time to feed one row a prompt, from an empty context to the logits after its last token."""

    def fill(self, tokens: list[int]) -> None:
        """Let every row's context be `tokens`. Each call brings a longer one, which begins with the one before."""

    def decode(self, context: int, steps: int) -> list[float]:
        """Times of decode steps, one token a row, the first after `context` tokens; fill came before."""

    def greedy(self, tokens: list[int], new_tokens: int) -> list[int]:
        """The greedy continuation of a prompt; what the cache held is lost."""

    def peak_memory(self) -> int:
        """Bytes, as `device.peak_memory`."""


class Minisa:
    """minisa, with or without Shared Attention."""

    def __init__(self, opening: Opening) -> None:
        torch.set_num_threads(opening.threads)
        before = peak_memory(opening.device)
        began = time.perf_counter()
        self.llm = opening.llm()
        self._facts = Facts(
            weight_bytes=self.llm.weight_bytes,
            memory_before=before,
            kv_itemsize=self.llm.cache.values.itemsize,
            load_seconds=time.perf_counter() - began,
            kv_bytes=self.llm.cache.bytes(),
            detail=self.llm.runner.name,
        )
        self._filled = 0

    def facts(self) -> Facts:
        return self._facts

    @torch.inference_mode()
    def prefill(self, tokens: list[int]) -> float:
        llm, prompt = self.llm, self._row(tokens)
        row = llm.cache.view(rows=slice(1))
        return timed(lambda: llm.runner.prefill(prompt, 0, row), llm.device)[0]

    @torch.inference_mode()
    def fill(self, tokens: list[int]) -> None:
        """The slots of a longer context or of a burst stay as they are: no step looks past its own position, and what
        a burst writes over in a ring takes as long to read."""
        if len(tokens) > self._filled:
            new = self._row(tokens[self._filled :])
            for i in range(self.llm.cache.batch):
                self.llm.runner.prefill(new, self._filled, self.llm.cache.view(rows=slice(i, i + 1)))
            self._filled = len(tokens)

    @torch.inference_mode()
    def decode(self, context: int, steps: int) -> list[float]:
        llm, batch = self.llm, self.llm.cache.batch
        step = llm.runner.stepper(llm.cache, Chooser.greedy(batch))
        tokens = torch.ones(batch, dtype=torch.int64, device=llm.device)
        positions = torch.full_like(tokens, context)
        for _ in range(LEAD_IN):
            step(tokens, positions, context + 1)
        step = llm.runner.stepper(llm.cache, Chooser.greedy(batch))
        synchronize(llm.device)
        times: list[float] = []
        began, queued = time.perf_counter(), False
        for i in range(steps):  # as in DecodingLoop: a token is read, and where it can be the next step queued before
            if not queued:
                tokens, positions = step(tokens, positions, context + i + 1)
            wait = begin_reading(tokens)
            if queued := llm.runner.asynchronous and i + 1 < steps:
                tokens, positions = step(tokens, positions, context + i + 2)
            wait()
            now = time.perf_counter()
            times.append(now - began)
            began = now
        return times

    @torch.inference_mode()
    def greedy(self, tokens: list[int], new_tokens: int) -> list[int]:
        llm = self.llm
        row = llm.cache.view(rows=slice(1))
        chosen = [int(llm.runner.prefill(self._row(tokens), 0, row).argmax())]
        while len(chosen) < new_tokens:
            position = len(tokens) + len(chosen) - 1
            token, positions = (torch.tensor([number], device=llm.device) for number in (chosen[-1], position))
            chosen.append(int(llm.runner.decode(token, positions, row, position + 1).argmax()))
        self._filled = 0
        return chosen

    def peak_memory(self) -> int:
        return peak_memory(self.llm.device)

    def _row(self, tokens: list[int]) -> Tensor:
        return torch.tensor([tokens], device=self.llm.device)
