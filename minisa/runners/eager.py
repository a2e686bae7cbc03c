"""The two functions a generation is made of, prefill and decode_one_token, and TorchRunner, which calls them.

Both take tensors, leave keys and values in the cache and return tensors; neither waits for the device.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from minisa.cache import StaticCache
from minisa.generation.runner import Runner
from minisa.model import Layer, Transformer
from minisa.quantize import QuantizedLinear

# Prompt tokens fed at a time: bounds the memory of activations and masks. A GPU needs more of them to be busy.
PREFILL_CHUNK = 512
PREFILL_CHUNK_CUDA = 2048


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


class TorchRunner(Runner):
    """Runs a model in PyTorch, eager or with compiled layers. A decode step reads exactly the slots in use."""

    def __init__(self, model: Transformer, *, compile: bool = False, name: str | None = None) -> None:
        """name: replaces "eager" or "torch.compile" where there is more to say."""
        self.model = model
        self.name = name or ("torch.compile" if compile else "eager")
        # On a CPU a step queued early would only delay the token chosen before it.
        self.asynchronous = model.norm.weight.is_cuda
        self.fixed_batch = compile
        if compile:
            compile_layers(model, on_gpu=model.norm.weight.is_cuda)

    @property
    def weight_bytes(self) -> int:
        return sum(weight.nbytes for weight in self.model.state_dict().values())

    def prefill(self, tokens: Tensor, start: int, cache: StaticCache) -> Tensor:
        return prefill(self.model, tokens, start, cache)

    def all_logits(self, tokens: Tensor, start: int, cache: StaticCache) -> Iterator[Tensor]:
        for hidden in prefill_chunks(self.model, tokens, start, cache):
            yield self.model.head(hidden)[0]

    def decode(self, tokens: Tensor, positions: Tensor, cache: StaticCache, in_use: int) -> Tensor:
        return decode_one_token(self.model, tokens, positions, cache.view(in_use))


def compile_layers(model: Transformer, *, on_gpu: bool) -> None:
    """Let torch.compile fuse what surrounds the attention of a decode step, and on a GPU of a prompt.

    A layer's few functions are compiled, once for all layers, and not a step of n_layers: that takes seconds instead
    of minutes, and the compiler sees neither the cache, whose length changes, nor the kernels. On a GPU prompts are
    compiled too, for any length; a CPU spends their time in matrix products, which compiling does not change.
    """
    if on_gpu:
        warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")  # fp32 was asked for explicitly
    limits = torch._dynamo.config  # each batch size is compiled by itself: beyond 8 torch would raise an error
    limits.recompile_limit = max(limits.recompile_limit, limits.accumulated_recompile_limit)
    for name in ("project", "project_values", "up", "down"):
        eager = getattr(Layer, name)
        # Tuned along every axis, products of one row become reductions, which read their weights faster than cuBLAS.
        one = torch.compile(eager, fullgraph=True, dynamic=False, options={"coordinate_descent_tuning": on_gpu})
        many = torch.compile(eager, fullgraph=True, dynamic=True) if on_gpu else eager
        for layer in model.layers:
            setattr(layer, name, _by_length(layer, one, many))
    if on_gpu and isinstance(model.output or model.tok_embeddings, QuantizedLinear):
        # For several rows the head is dequantized, which only compiled code does in one go.
        head = torch.compile(Transformer.head, fullgraph=True, dynamic=True)
        model.head = _by_length(model, head, head)  # type: ignore[method-assign]


def _by_length(owner: nn.Module, one: Callable[..., Any], many: Callable[..., Any]) -> Callable[..., Any]:
    """A method of owner's for x [B, T, dim]: `one` where T is 1, else `many`. It does not keep owner alive, so the
    memory of weights is free as soon as their model is gone."""
    reference = weakref.ref(owner)
    return lambda x, *rest: (one if x.shape[1] == 1 else many)(reference(), x, *rest)
