"""GraphRunner: a decode step and the choice after it as one CUDA graph; a step that guesses ahead as another.

A step of a small batch is hundreds of short kernels, which the host would launch more slowly than the device runs them.
Recorded once, they are launched as one. A graph replays the same kernels on the same memory, so whatever changes from
step to step stays on the device: tokens, positions, and through them how far attention reads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from minisa.cache import StaticCache
from minisa.generation.sampling import Chooser
from minisa.generation.speculate import MAX_GUESSES, Price
from minisa.model import Transformer
from minisa.quantize import QuantizedLinear
from minisa.runners.eager import Step, TorchRunner, decode_one_token

MOST_GRAPHS = 16  # kept at once, each for a number of rows and a way of sampling; the oldest goes first
AHEAD = 1 + MAX_GUESSES  # tokens of a step that guesses ahead
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
        super().__init__(model, compile=compile)
        self.name = "CUDA graph"
        self.asynchronous = True
        self.fixed_batch = True
        self._record = record or CudaGraphs(model.norm.weight.device)
        self._graphs: dict[object, Any] = {}

    def stepper(self, cache: StaticCache, choose: Chooser) -> Step:
        """As TorchRunner.stepper. The graph is recorded at the first step."""
        graph: _Graph | None = None

        def step(tokens: Tensor, positions: Tensor, in_use: int) -> tuple[Tensor, Tensor]:
            nonlocal graph
            if graph is None:
                graph = self._graph(cache, tokens, positions, choose)
                graph.begin(tokens, positions, choose)
            return graph.step(choose.batch)

        return step

    def price(self, cache: StaticCache) -> Price | None:
        """As TorchRunner.price. A ring is not recorded, and steps without a graph take too long to be risked."""
        if cache.wraps:
            return None
        return QUANTIZED_PRICE if isinstance(self.model.tok_embeddings, QuantizedLinear) else GRAPH_PRICE

    def verify(self, tokens: Tensor, start: int, cache: StaticCache) -> Tensor:
        """As TorchRunner.verify, for [1, AHEAD] tokens: by this price, MAX_GUESSES are guessed or none. No ring."""
        key = (cache.values.data_ptr(), cache.values.stride(), cache.length, "guesses")
        graph = self._kept(key, lambda: _Verification(self.model, cache, tokens, start, self._record))
        return graph.verify(tokens, start)

    def _graph(self, cache: StaticCache, tokens: Tensor, positions: Tensor, choose: Chooser) -> _Graph:
        bucket = min(1 << (choose.batch - 1).bit_length(), cache.batch)
        sampling = choose.sampling
        key = (cache.values.data_ptr(), cache.values.stride(), cache.length, bucket, sampling)
        rows = cache.view(rows=slice(bucket))
        return self._kept(key, lambda: _Graph(self.model, rows, tokens, positions, choose, self._record))

    def _kept(self, key: object, make: Callable[[], Graph]) -> Graph:
        if key not in self._graphs:
            if len(self._graphs) >= MOST_GRAPHS:
                del self._graphs[next(iter(self._graphs))]
            self._graphs[key] = make()
        return self._graphs[key]


@dataclass(frozen=True, slots=True)
class _State:
    """What a graph reads and writes, at addresses that stay: [bucket] each, and the Chooser's."""

    tokens: Tensor
    positions: Tensor
    choose: Chooser


class _Graph:
    """One recorded step."""

    def __init__(
        self,
        model: Transformer,
        cache: StaticCache,
        tokens: Tensor,
        positions: Tensor,
        choose: Chooser,
        record: Record,
    ) -> None:
        bucket = cache.batch
        self._cache = cache  # the graph writes to its memory, and is known by the address
        self._last = last = cache.length - 1
        zeros = torch.zeros(2, bucket, dtype=torch.int64, device=cache.values.device)
        self._state = _State(zeros[0], zeros[1], _widened(choose, bucket))
        # It warms up on the generation's next positions, which nothing has been written to that will be read.
        self.begin(tokens, positions, choose)

        def body() -> None:
            state = self._state
            logits = decode_one_token(model, state.tokens.clamp(min=0), state.positions, cache)  # NO_TOKEN ends a row
            state.tokens.copy_(state.choose(logits, state.positions))
            # A row that has ended goes on to the end of the cache: nobody reads what it writes there.
            state.positions.add_(1).clamp_(max=last)

        self._replay = record(body)

    def begin(self, tokens: Tensor, positions: Tensor, choose: Chooser) -> None:
        """Take over the state of a generation. Rows without a prompt begin at slot 0."""
        ours, batch = self._state, choose.batch
        for mine, theirs in (
            (ours.tokens, tokens),
            (ours.positions, positions.clamp(max=self._last)),
            (ours.choose.uniforms, choose.uniforms),
            (ours.choose.seen, choose.seen),
        ):
            if mine is not None and theirs is not None:
                mine.zero_()
                mine[:batch].copy_(theirs)

    def step(self, batch: int) -> tuple[Tensor, Tensor]:
        """Tokens [batch] of their own, since the next step writes over the graph's, and positions [batch]."""
        self._replay()
        return self._state.tokens[:batch].clone(), self._state.positions[:batch]


class _Verification:
    """The logits after each of AHEAD tokens of the first row, recorded."""

    def __init__(self, model: Transformer, cache: StaticCache, tokens: Tensor, start: int, record: Record) -> None:
        self._cache = cache  # as in _Graph
        self._tokens = torch.zeros(1, AHEAD, dtype=torch.int64, device=cache.values.device)
        self._positions = torch.zeros_like(self._tokens)
        self._logits: Tensor  # where the body leaves them, and a replay
        self._set(tokens, start)

        def body() -> None:
            self._logits = model(self._tokens, self._positions, cache)[0]

        self._replay = record(body)

    def verify(self, tokens: Tensor, start: int) -> Tensor:
        """Logits [AHEAD, vocab_size] of tokens [1, AHEAD] at positions start, start + 1, …; the next call writes over
        them."""
        self._set(tokens, start)
        self._replay()
        return self._logits

    def _set(self, tokens: Tensor, start: int) -> None:
        self._tokens.copy_(tokens)
        self._positions.copy_(torch.arange(start, start + AHEAD, device=tokens.device))


def _widened(choose: Chooser, bucket: int) -> Chooser:
    def widened(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.new_zeros(bucket, tensor.shape[1])

    return replace(choose, batch=bucket, uniforms=widened(choose.uniforms), seen=widened(choose.seen))


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
