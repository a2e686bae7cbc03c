"""The two functions a generation is made of, prefill and decode_one_token, and TorchRunner, which calls them.

Both take tensors, leave keys and values in the cache and return tensors; neither waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from minisa.cache import StaticCache
from minisa.model import Transformer

PREFILL_CHUNK = 512  # tokens at a time: bounds the memory of activations and masks, however long the prompt
SMALLEST_BUCKET = 256


def prefill_chunks(model: Transformer, tokens: Tensor, start: int, cache: StaticCache) -> Iterator[Tensor]:
    """Feed tokens [B, T] at positions start, start + 1, …; yields hidden states [B, ≤ PREFILL_CHUNK, dim].

    The cache already holds the `start` tokens before them. Raises MinisaError if it is too short.
    """
    for part in tokens.split(PREFILL_CHUNK, dim=1):
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


class TorchRunner:
    """Runs a model in PyTorch, eager or compiled.

    Eager, a decode step sees exactly the slots in use. Compiled, it sees a bucket of 256, 512, 1024, … of them, so
    that the shapes seldom change; the mask hides the rest.
    """

    def __init__(self, model: Transformer, *, compile: bool = False) -> None:
        self.model = model
        self.name = "torch.compile" if compile else "eager"
        self._bucketed = compile
        # Elsewhere a step is not queued but done, and would keep back the token chosen before it.
        self.queues = model.norm.weight.device.type == "cuda"
        self._step: Callable[[Transformer, Tensor, Tensor, StaticCache], Tensor] = decode_one_token
        if compile:
            self._step = torch.compile(decode_one_token, fullgraph=True, dynamic=True)

    @property
    def weight_bytes(self) -> int:
        return sum(weight.nbytes for weight in self.model.state_dict().values())

    def prefill(self, tokens: Tensor, start: int, cache: StaticCache) -> Tensor:
        """`prefill` with this runner's model."""
        return prefill(self.model, tokens, start, cache)

    def all_logits(self, tokens: Tensor, start: int, cache: StaticCache) -> Iterator[Tensor]:
        """Logits [≤ PREFILL_CHUNK, vocab_size] of every one of tokens [1, T], fed at positions start, start + 1, …"""
        for hidden in prefill_chunks(self.model, tokens, start, cache):
            yield self.model.head(hidden)[0]

    def decode(self, tokens: Tensor, positions: Tensor, cache: StaticCache, in_use: int) -> Tensor:
        """`decode_one_token` over the first in_use slots of the cache, which positions [B] lie in.

        Raises MinisaError where in_use is more than the cache holds.
        """
        return self._step(self.model, tokens, positions, cache.view(self._visible(in_use, cache.length)))

    def _visible(self, in_use: int, length: int) -> int:
        if not self._bucketed or in_use > length:
            return in_use
        bucket = max(SMALLEST_BUCKET, 1 << (in_use - 1).bit_length())
        return min(bucket, length)
