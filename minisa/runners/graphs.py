"""GraphRunner: a decode step and the choice after it as one CUDA graph; a step that verifies guesses as another.

A step of a small batch is hundreds of short kernels, which the host would launch more slowly than the device runs them.
Recorded once, they are launched as one. A graph replays the same kernels on the same memory, so whatever changes from
step to step stays on the device: tokens, positions, and through them how far attention reads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from minisa.cache import StaticCache
from minisa.generation.runner import Step
from minisa.generation.sampling import Chooser
from minisa.generation.speculate import MAX_GUESSES, Price
from minisa.model import Transformer
from minisa.quantize import QuantizedLinear
from minisa.runners.eager import TorchRunner, decode_one_token

MAX_GRAPHS = 16  # kept at once, each for a number of rows and a way of sampling; the oldest goes first
AHEAD = 1 + MAX_GUESSES  # tokens of a step that verifies guesses
# Its tokens are computed together, and read before the next step is known: on an H200 that cost 0.4 steps more with
# Llama-3-8B, 1.1 to 1.4 with SmolLM2-135M. A quantized model's weights are dequantized for it: 2.3 with int4.
GRAPH_PRICE, QUANTIZED_PRICE = Price(1.5, 0.0), Price(3.0, 0.0)
WARM_UP = 3  # runs before recording: compilers, tuners and libraries set themselves up in them

Graph = TypeVar("Graph")
Body = Callable[[], None]
Record = Callable[[Body], Body]  # runs a body a few times and returns what replays it


class GraphRunner(TorchRunner):
    """Runs a model whose backend is `kernels` with compiled layers, its decode steps as CUDA graphs.

    Batch sizes come in buckets of 1, 2, 4, …, so that few graphs are recorded; all of them share one pool of memory.
    A bucket is filled up with rows of the cache that no prompt is in.
    record: how a body becomes a graph; tests give their own.
    """

    def __init__(self, model: Transformer, *, compile: bool = True, record: Record | None = None) -> None:
        for layer in model.layers:
            if hasattr(layer.attention, "wq"):
                layer.attention.join()  # type: ignore[operator, union-attr]
        super().__init__(model, compile=compile, name="CUDA graph")
        self.asynchronous = self.fixed_batch = True
        self._record = record or CudaGraphs(model.norm.weight.device)
        self._graphs: dict[object, Any] = {}

    def stepper(self, cache: StaticCache, choose: Chooser) -> Step:
        """As Runner.stepper. The graph is recorded at the first step."""
        bucket = min(1 << (choose.batch - 1).bit_length(), cache.batch)
        graph: _StepGraph | None = None

        def step(tokens: Tensor, positions: Tensor, in_use: int) -> tuple[Tensor, Tensor]:
            nonlocal graph
            if graph is None:
                rows = cache.view(rows=slice(bucket))
                graph = self._kept(cache, (bucket, choose.sampling), lambda: _StepGraph(self.model, rows, choose))
                graph.begin(tokens, positions, choose, self._record)
            return graph.step(choose.batch)

        return step

    def price(self, cache: StaticCache) -> Price | None:
        """As Runner.price. A ring is not recorded, and steps without a graph take too long to be risked."""
        if cache.wraps:
            return None
        return QUANTIZED_PRICE if isinstance(self.model.tok_embeddings, QuantizedLinear) else GRAPH_PRICE

    def verify(self, tokens: Tensor, start: int, cache: StaticCache) -> Tensor:
        """As Runner.verify, for [1, AHEAD] tokens: by this price, MAX_GUESSES are guessed or none. No ring."""
        graph = self._kept(cache, "guesses", lambda: _VerifyGraph(self.model, cache))
        return graph.verify(tokens, start, self._record)

    def _kept(self, cache: StaticCache, what: object, make: Callable[[], Graph]) -> Graph:
        key = (cache.values.data_ptr(), cache.values.stride(), cache.length, what)
        if key not in self._graphs:
            if len(self._graphs) >= MAX_GRAPHS:
                del self._graphs[next(iter(self._graphs))]
            self._graphs[key] = make()
        return self._graphs[key]


class _StepGraph:
    """One recorded step for the rows of a cache. Its tokens [B], positions [B] and Chooser stay at their addresses."""

    def __init__(self, model: Transformer, cache: StaticCache, choose: Chooser) -> None:
        def widened(state: Tensor | None) -> Tensor | None:
            return None if state is None else state.new_zeros(cache.batch, state.shape[1])

        self._model, self._cache = model, cache
        self._tokens, self._positions = torch.zeros(2, cache.batch, dtype=torch.int64, device=cache.values.device)
        self._choose = replace(choose, batch=cache.batch, uniforms=widened(choose.uniforms), seen=widened(choose.seen))
        self._replay: Body | None = None

    def begin(self, tokens: Tensor, positions: Tensor, choose: Chooser, record: Record) -> None:
        """Take over the state of a generation. Rows without a prompt begin at slot 0."""
        if self._replay is None:
            # It warms up on the generation's next positions, where nothing is written yet that will be read.
            self._copy(tokens, positions, choose)
            self._replay = record(self._body)
        self._copy(tokens, positions, choose)

    def step(self, batch: int) -> tuple[Tensor, Tensor]:
        """Tokens [batch] of their own, since the next step writes over the graph's, and positions [batch]."""
        assert self._replay is not None
        self._replay()
        return self._tokens[:batch].clone(), self._positions[:batch]

    def _body(self) -> None:
        # NO_TOKEN ends a row, which goes on to the end of the cache: nobody reads what it writes there.
        logits = decode_one_token(self._model, self._tokens.clamp(min=0), self._positions, self._cache)
        self._tokens.copy_(self._choose(logits, self._positions))
        self._positions.add_(1).clamp_(max=self._cache.length - 1)

    def _copy(self, tokens: Tensor, positions: Tensor, choose: Chooser) -> None:
        for ours, theirs in (
            (self._tokens, tokens),
            (self._positions, positions.clamp(max=self._cache.length - 1)),
            (self._choose.uniforms, choose.uniforms),
            (self._choose.seen, choose.seen),
        ):
            if ours is not None and theirs is not None:
                ours.zero_()
                ours[: choose.batch].copy_(theirs)


class _VerifyGraph:
    """The logits after each of AHEAD tokens of a cache's only row, recorded."""

    def __init__(self, model: Transformer, cache: StaticCache) -> None:
        self._model, self._cache = model, cache
        self._tokens, self._positions = torch.zeros(2, 1, AHEAD, dtype=torch.int64, device=cache.values.device)
        self._logits: Tensor  # where the body leaves them, and a replay
        self._replay: Body | None = None

    def verify(self, tokens: Tensor, start: int, record: Record) -> Tensor:
        """Logits [AHEAD, vocab_size] of tokens [1, AHEAD] at positions start, start + 1, …, until the next call."""
        self._tokens.copy_(tokens)
        self._positions.copy_(torch.arange(start, start + AHEAD, device=tokens.device))
        self._replay = self._replay or record(self._body)
        self._replay()
        return self._logits

    def _body(self) -> None:
        self._logits = self._model(self._tokens, self._positions, self._cache)[0]


class CudaGraphs:
    """Records bodies as CUDA graphs, whose scratch memory is one pool: only one of them runs at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = None

    def __call__(self, body: Body) -> Body:
        with torch.cuda.device(self._device):
            here, aside = torch.cuda.current_stream(), torch.cuda.Stream()
            aside.wait_stream(here)
            with torch.cuda.stream(aside):
                for _ in range(WARM_UP):
                    body()
            here.wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, stream=aside):  # its own default is the first GPU's
                body()
        self._pool = graph.pool()
        return graph.replay
