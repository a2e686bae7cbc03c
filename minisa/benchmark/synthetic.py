"""random_llm: a model's shape without its checkpoint, filled with noise. For measuring; it talks gibberish."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from minisa.attention import fastest_backend
from minisa.cache import StaticCache
from minisa.checkpoint import Checkpoint, load_weights
from minisa.config import ModelConfig
from minisa.device import choose_dtype, choose_kv_dtype
from minisa.engine import LLM
from minisa.errors import MinisaError
from minisa.model import Transformer
from minisa.quantize import check_quantization
from minisa.runners.choice import native_step
from minisa.sharing import SharingPlan
from minisa.text.dialog import DIALOGS

N_NOISE = 1_048_573  # values drawn, then repeated; a prime, so that the rows of a matrix differ


def random_llm(
    config: ModelConfig,
    plan: SharingPlan,
    *,
    device: torch.device | str,
    dtype: torch.dtype | str,
    max_seq_len: int,
    max_batch: int = 1,
    quantize: str | None = None,
    kv_dtype: str = "auto",
    backend: str | None = None,
    compile: bool | None = None,
    seed: int = 0,
) -> LLM:
    """An LLM with the weights of `random_checkpoint`. It takes token ids, not text. Options: those of `load`."""
    device, weight_format = torch.device(device), check_quantization(quantize)
    with torch.device("meta"):
        transformer = Transformer(config, plan, backend or fastest_backend(device))
    if isinstance(dtype, str):
        native = native_step(config, device, compile=compile, quantized=quantize is not None) is not None
        dtype = choose_dtype(dtype, device, native=native)
    kept = choose_kv_dtype(kv_dtype, dtype)
    load_weights(transformer, random_checkpoint(config, seed), device=device, dtype=dtype, quantize=weight_format)
    transformer.to(device)  # the buffers
    cache = StaticCache.allocate(config, plan, batch=max_batch, max_seq_len=max_seq_len, device=device, dtype=kept)
    tokenizer: Any = _NoTokenizer()
    return LLM(transformer, tokenizer, lambda: DIALOGS["raw"], cache, quantized=weight_format, compile=compile)


def random_checkpoint(config: ModelConfig, seed: int = 0) -> Checkpoint:
    """What `open_checkpoint` would return for a file of noise, the same for the same seed.

    Matrices are scaled so that activations and logits stay near 1; norms are 1.
    """
    with torch.device("meta"):
        shapes = Transformer(config, SharingPlan.none(config.n_layers)).state_dict()
    noise = torch.randn(N_NOISE, generator=torch.Generator().manual_seed(seed))
    tensors = {name: _Noise(name, tuple(meta.shape), noise) for name, meta in shapes.items()}
    return Checkpoint(Path("random weights"), config, tensors, (), interleaved=False, format="noise", files=())


@dataclass(frozen=True, slots=True)
class _Noise:
    """A StoredTensor that is drawn, not stored: row after row from the same noise, over and over."""

    name: str
    shape: tuple[int, ...]
    noise: Tensor

    def read_rows(self, start: int, stop: int) -> Tensor:
        if len(self.shape) == 1:
            return torch.ones(stop - start)
        width = math.prod(self.shape[1:])
        begin, count = start * width % N_NOISE, (stop - start) * width
        end = begin + count
        values = (self.noise if end <= N_NOISE else self.noise.repeat(end // N_NOISE + 1))[begin:end]
        return (values * width**-0.5).view(stop - start, *self.shape[1:])


class _NoTokenizer:
    def __getattr__(self, name: str) -> NoReturn:
        raise MinisaError("a model with random weights has no tokenizer: feed it token ids")
