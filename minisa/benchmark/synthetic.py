"""random_llm: a model's shape without its checkpoint, filled with noise. For measuring; it talks gibberish."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minisa.checkpoint import Checkpoint
from minisa.config import ModelConfig
from minisa.engine import LLM, load
from minisa.model import Transformer
from minisa.sharing import SharingPlan

N_NOISE = 1_048_573  # values drawn, then repeated; a prime, so that the rows of a matrix differ


def random_llm(
    config: ModelConfig,
    plan: SharingPlan,
    *,
    device: torch.device | str,
    dtype: torch.dtype | str,
    max_seq_len: int,
    seed: int = 0,
    **options: Any,
) -> LLM:
    """An LLM with the weights of `random_checkpoint`, which takes token ids, not text. options: those of `load`."""
    checkpoint = random_checkpoint(config, seed)
    return load(checkpoint, plan, str(device), dtype, max_seq_len, chat_format="raw", **options)


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
