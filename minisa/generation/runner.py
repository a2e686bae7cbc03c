"""Runner: what executes a model's prefill and decode steps, as generation sees it. The runners are in runners/."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from minisa.cache import StaticCache
from minisa.generation.sampling import Chooser
from minisa.generation.speculate import PRICE, Price
from minisa.model import Transformer

# tokens [B] at positions [B], all below in_use → the next tokens [B] and their positions [B]
Step = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]


class Runner(ABC):
    """Executes one model. Tokens and positions are int64, caches may be views; logits are of the runner's own dtype.

    Every method that is given a cache raises MinisaError if it is too short.
    """

    model: Transformer
    name: str  # for people
    asynchronous: bool  # whether a step returns before it is done
    fixed_batch: bool  # whether each batch size is compiled or recorded by itself, so that it had better not change

    @property
    @abstractmethod
    def weight_bytes(self) -> int:
        """Bytes of the weights as they are stored."""

    @abstractmethod
    def prefill(self, tokens: Tensor, start: int, cache: StaticCache) -> Tensor:
        """Feed tokens [B, T] at positions start, start + 1, …; logits [B, vocab_size] after the last."""

    @abstractmethod
    def all_logits(self, tokens: Tensor, start: int, cache: StaticCache) -> Iterator[Tensor]:
        """Feed tokens [1, T] likewise; yields the logits [≤ chunk, vocab_size] after each of them, chunk by chunk."""

    @abstractmethod
    def decode(self, tokens: Tensor, positions: Tensor, cache: StaticCache, in_use: int) -> Tensor:
        """Feed a token a row, tokens [B] at positions [B], all below in_use; logits [B, vocab_size]."""

    def price(self, cache: StaticCache) -> Price | None:
        """What guessing ahead costs with this cache; None where it never pays."""
        return PRICE

    def verify(self, tokens: Tensor, start: int, cache: StaticCache) -> Tensor:
        """As all_logits, of the last token and the guesses after it: [T, vocab_size], valid until the next call."""
        return joined(self.all_logits(tokens, start, cache))

    def stepper(self, cache: StaticCache, choose: Chooser) -> Step:
        """What decodes and chooses tokens for the first `choose.batch` rows of the cache. One is in use at a time."""
        rows = cache.view(rows=slice(choose.batch))

        def step(tokens: Tensor, positions: Tensor, in_use: int) -> tuple[Tensor, Tensor]:
            # A finished row stays in the last slot in use: nobody reads what it writes there.
            positions = positions.clamp(max=in_use - 1)
            # A row stopped by non-finite logits has no token; feed 0.
            logits = self.decode(tokens.clamp(min=0), positions, rows, in_use)
            return choose(logits, positions), positions + 1

        return step


def joined(parts: Iterable[Tensor]) -> Tensor:
    """The rows of all parts in one tensor. A single part is returned as it is: a large copy wakes PyTorch's thread
    pool, which then busy-waits on cores that the next C++ step needs."""
    first, *rest = parts
    return torch.cat((first, *rest)) if rest else first
