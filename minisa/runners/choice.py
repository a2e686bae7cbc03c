"""Runners: what executes a model's prefill and decode steps, and the one place that chooses among them."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from minisa.cache import StaticCache
from minisa.config import ModelConfig
from minisa.generation.sampling import Chooser
from minisa.generation.speculate import Price
from minisa.model import Transformer
from minisa.quantize import QuantizedEmbedding, use_kernels
from minisa.runners.eager import Step, TorchRunner
from minisa.runners.graphs import GraphRunner
from minisa.runners.native.build import compiler_works, open_library
from minisa.runners.native.runner import NativeRunner, supports


class Runner(Protocol):
    """Executes one model. Tokens and positions are int64, caches may be views; logits are the runner's own dtype.

    name: for people. asynchronous: whether a step returns before it is done. fixed_batch: whether each batch size is
        compiled or recorded by itself, so that stepping all rows, unused ones too, is better than only those in use.
        weight_bytes: what its weights take.
    prefill: tokens [B, T] at positions start, start + 1, … → logits [B, vocab_size] after the last.
    all_logits: tokens [1, T] likewise → logits [≤ chunk, vocab_size] of every one, chunk by chunk.
    price: of guessing ahead in a cache; None where that never pays.
    verify: as all_logits, for a token and the guesses after it that the price allows: [T, vocab_size], until the next
        call.
    decode: tokens [B] at positions [B], all < in_use slots of the cache → logits [B, vocab_size].
    stepper: what decodes and chooses for a generation on the first rows of the cache; one at a time.
    Raises MinisaError where the cache is too short.
    """

    model: Transformer

    @property
    def name(self) -> str: ...
    @property
    def asynchronous(self) -> bool: ...
    @property
    def fixed_batch(self) -> bool: ...
    @property
    def weight_bytes(self) -> int: ...
    def prefill(self, tokens: Tensor, start: int, cache: StaticCache) -> Tensor: ...
    def all_logits(self, tokens: Tensor, start: int, cache: StaticCache) -> Iterator[Tensor]: ...
    def price(self, cache: StaticCache) -> Price | None: ...
    def verify(self, tokens: Tensor, start: int, cache: StaticCache) -> Tensor: ...
    def decode(self, tokens: Tensor, positions: Tensor, cache: StaticCache, in_use: int) -> Tensor: ...
    def stepper(self, cache: StaticCache, choose: Chooser) -> Step: ...


def choose_runner(model: Transformer, compile: bool | None = None) -> Runner:
    """The fastest runner for a loaded model.

    compile: True for a compiled one, waiting for the compiler if need be: CUDA graphs with Triton's kernels on a GPU;
        on a CPU the C++ step where it fits, else torch.compile, and eager where no compiler works. False for PyTorch's
        eager mode. None for CUDA graphs on a GPU too, and on a CPU for what is ready now, as in `native_step`.
    Weights move out of the model into a C++ step's own layout.
    """
    weight = model.norm.weight
    if model.backend.name == "kernels" and weight.is_cuda:
        use_kernels(model)  # whose int4 the C++ step could not pack
        if compile is not False:
            return GraphRunner(model)
    if weight.dtype == torch.bfloat16:
        quantized = isinstance(model.tok_embeddings, QuantizedEmbedding)
        library = native_step(model.config, weight.device, compile=compile, quantized=quantized)
        if library is not None:
            return NativeRunner(model, library)
    if compile is True and weight.device.type == "cpu" and not compiler_works():
        return TorchRunner(model, name="eager (no C++ compiler here)")
    return TorchRunner(model, compile=compile is True)


def native_step(
    config: ModelConfig, device: torch.device, *, compile: bool | None, quantized: bool
) -> ctypes.CDLL | None:
    """The C++ step for a bf16 or quantized model; None where it does not fit, is not wanted or is not ready.

    With compile None it is ready if it was built on this machine before; else it is built in the background, for the
    next time. Quantized weights wait for it: PyTorch takes longer for a few words than the compiler for the step.
    """
    if device.type != "cpu" or compile is False or not supports(config):
        return None
    return open_library(wait=compile is True or quantized)


def may_become_native(runner: Runner, compile: bool | None) -> bool:
    """Whether choose_runner may find more than this runner later, when the C++ step has been built."""
    weight, config = runner.model.norm.weight, runner.model.config
    fits = weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and supports(config)
    return fits and compile is None and not isinstance(runner, NativeRunner)
