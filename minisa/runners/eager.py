"""The two functions a generation is made of, prefill and decode_one_token, and TorchRunner, which calls them.

Both take tensors, leave keys and values in the cache and return tensors; neither waits for the device.
"""

from __future__ import annotations

import warnings
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from minisa.cache import StaticCache
from minisa.generation.sampling import Chooser
from minisa.generation.speculate import PRICE, Price
from minisa.model import Layer, Transformer
from minisa.quantize import QuantizedLinear

# Tokens of a prompt at a time: bounds the memory of activations and masks, however long the prompt. A GPU needs more of
# them to be busy.
PREFILL_CHUNK = 512
PREFILL_CHUNK_CUDA = 2048

# tokens [B] at positions [B], all < in_use slots → the next tokens and their positions
Step = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]


def prefill_chunks(model: Transformer, tokens: Tensor, start: int, cache: StaticCache) -> Iterator[Tensor]:
    """Feed tokens [B, T] at positions start, start + 1, …; yields hidden states [B, ≤ chunk, dim].

    The cache already holds the `start` tokens before them. Raises MinisaError if it is too short.
    """
    for part in tokens.split(PREFILL_CHUNK_CUDA if tokens.is_cuda else PREFILL_CHUNK, dim=1):
        end = start + part.shape[1]
        positions = torch.arange(start, end, device=tokens.device).expand_as(part)
        yield model.hidden(part, positions, cache.view(end))
        start = end


def prefill(model: Transformer, tokens: Tensor, start: int, cache: StaticCache) -> Tensor:
    """As prefill_chunks, for the logits [B, vocab_size] after the last token only."""
    for hidden in prefill_chunks(model, tokens, start, cache):
        last = hidden[:, -1]
    return model.head(last)


def decode_one_token(model: Transformer, tokens: Tensor, positions: Tensor, cache: StaticCache) -> Tensor:
    """Feed one token a row, tokens [B] at positions [B]; logits [B, vocab_size] for the next."""
    return model(tokens[:, None], positions[:, None], cache)[:, 0]


def joined(parts: Iterable[Tensor]) -> Tensor:
    """Their rows in one tensor. A single part is not copied: PyTorch's threads, which share the copy of many logits
    out, would spin after it for milliseconds, on cores that the next C++ step needs."""
    first, *rest = parts
    return torch.cat((first, *rest)) if rest else first


def compile_layers(model: Transformer, *, on_gpu: bool) -> None:
    """Let torch.compile fuse what surrounds the attention of a decode step, and on a GPU of a prompt.

    A layer's few functions are compiled, once for all layers, in place of a step of n_layers: that takes seconds and
    not minutes, and the compiler sees neither the cache, whose length changes, nor the kernels. A prompt's are
    compiled for any length; a CPU's time goes into its products, and its prompts stay as they are.
    """
    if on_gpu:
        warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")  # who takes fp32 means it
    limits = torch._dynamo.config  # every number of rows is compiled by itself: beyond 8 torch would raise an error
    limits.recompile_limit = max(limits.recompile_limit, limits.accumulated_recompile_limit)
    for name in ("project", "project_values", "up", "down"):
        eager = getattr(Layer, name)
        # Tuned along every axis, products of one row become reductions, which read their weights faster than cuBLAS.
        one = torch.compile(eager, fullgraph=True, dynamic=False, options={"coordinate_descent_tuning": on_gpu})
        many = torch.compile(eager, fullgraph=True, dynamic=True) if on_gpu else eager
        compiled = _by_length(one, many)
        for layer in model.layers:
            setattr(layer, name, _method(layer, compiled))
    if on_gpu and isinstance(model.output or model.tok_embeddings, QuantizedLinear):
        # For several rows it is dequantized, in one go if that is compiled.
        model.head = _method(model, torch.compile(Transformer.head, fullgraph=True, dynamic=True))  # type: ignore[method-assign]


def _by_length(one: Callable[..., Any], many: Callable[..., Any]) -> Callable[..., Any]:
    """For a layer and x [B, T, dim]: `one` where T is 1, else `many`."""

    def function(layer: Layer, x: Tensor, *rest: Any) -> Any:
        return (one if x.shape[1] == 1 else many)(layer, x, *rest)

    return function


def _method(owner: nn.Module, function: Callable[..., Any]) -> Callable[..., Any]:
    """A method of owner's that does not keep it alive: the memory of weights is free once their model is gone."""
    reference = weakref.ref(owner)
    return lambda *inputs: function(reference(), *inputs)


def plain_step(
    decode: Callable[[Tensor, Tensor, StaticCache, int], Tensor], cache: StaticCache, choose: Chooser
) -> Step:
    """A decode step and the choice after it, one after the other."""
    rows = cache.view(rows=slice(choose.batch))

    def step(tokens: Tensor, positions: Tensor, in_use: int) -> tuple[Tensor, Tensor]:
        # A row that has ended stays in the last slot in use: nobody reads what it writes there.
        positions = positions.clamp(max=in_use - 1)
        # One that has ended for want of numbers has no token to go on from.
        return choose(decode(tokens.clamp(min=0), positions, rows, in_use), positions), positions + 1

    return step


class RunnerBase(ABC):
    """What a runner's other methods make of its `all_logits` and `decode`."""

    @abstractmethod
    def all_logits(self, tokens: Tensor, start: int, cache: StaticCache) -> Iterator[Tensor]:
        """Logits [≤ chunk, vocab_size] of every one of tokens [1, T], fed at positions start, start + 1, …"""

    @abstractmethod
    def decode(self, tokens: Tensor, positions: Tensor, cache: StaticCache, in_use: int) -> Tensor:
        """`decode_one_token` over the first in_use slots of the cache, which positions [B] lie in.

        Raises MinisaError where in_use is more than the cache holds.
        """

    def price(self, cache: StaticCache) -> Price | None:
        """Of guessing ahead in a cache; None where that never pays."""
        return PRICE

    def verify(self, tokens: Tensor, start: int, cache: StaticCache) -> Tensor:
        """Logits [T, vocab_size] of each of a few tokens [1, T], the last one chosen and guesses after it."""
        return joined(self.all_logits(tokens, start, cache))

    def stepper(self, cache: StaticCache, choose: Chooser) -> Step:
        """What decodes a generation on the first rows of the cache."""
        return plain_step(self.decode, cache, choose)


class TorchRunner(RunnerBase):
    """Runs a model in PyTorch, eager or with compiled layers. A decode step sees exactly the slots in use."""

    def __init__(self, model: Transformer, *, compile: bool = False, name: str | None = None) -> None:
        """name: for people, if there is more to say than how it runs."""
        self.model = model
        self.name = name or ("torch.compile" if compile else "eager")
        # On a CPU a step begun ahead would be done at once, and delay the token chosen before it.
        self.asynchronous = model.norm.weight.is_cuda
        self.fixed_batch = compile
        if compile:
            compile_layers(model, on_gpu=model.norm.weight.is_cuda)

    @property
    def weight_bytes(self) -> int:
        return sum(weight.nbytes for weight in self.model.state_dict().values())

    def prefill(self, tokens: Tensor, start: int, cache: StaticCache) -> Tensor:
        """`prefill` with this runner's model."""
        return prefill(self.model, tokens, start, cache)

    def all_logits(self, tokens: Tensor, start: int, cache: StaticCache) -> Iterator[Tensor]:
        for hidden in prefill_chunks(self.model, tokens, start, cache):
            yield self.model.head(hidden)[0]

    def decode(self, tokens: Tensor, positions: Tensor, cache: StaticCache, in_use: int) -> Tensor:
        return decode_one_token(self.model, tokens, positions, cache.view(in_use))
