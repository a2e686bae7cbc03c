"""The streaming generator: token ids in, small records of text out."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from minisa.cache import StaticCache
from minisa.generation.loop import DecodingLoop
from minisa.generation.row import Chunk, Options, Prefix
from minisa.generation.runner import Runner
from minisa.generation.speculate import PromptLookup
from minisa.text.tokenizer import Tokenizer


@torch.inference_mode()
def compute_prefix(runner: Runner, cache: StaticCache, tokens: list[int]) -> Prefix:
    """Feed tokens to an empty cache of one row, long enough for them."""
    runner.prefill(torch.tensor([tokens], device=cache.values.device), 0, cache)
    return Prefix(tokens, cache)


def generate(
    runner: Runner,
    cache: StaticCache,
    tokenizer: Tokenizer,
    prompts: Sequence[list[int]],
    options: Options,
    held: list[int] | None = None,
    prefix: Prefix | None = None,
) -> Iterator[Chunk]:
    """Yield the chunks of every prompt's continuation, one token of each unfinished row at a time.

    prompts: one row of the cache each, from the first on.
    held: for a single prompt, the tokens that the cache holds; its common prefix with the prompt is not fed again,
        and the list is kept up to date whenever the generator pauses or is closed.
    prefix: what a prompt has in common with it is copied into its row, where the cache does not hold more already.
    """
    sampling = options.sampling
    loop_type = SpeculativeLoop if options.speculate else DecodingLoop
    loop = loop_type(runner, cache, tokenizer, sampling, len(prompts))
    for prompt, seed in zip(prompts, sampling.seeds(len(prompts)), strict=True):
        loop.add(prompt, replace(options, sampling=replace(sampling, seed=seed)), held, prefix)
    yield from loop


class SpeculativeLoop(DecodingLoop):
    """A decoding loop of one row. A step may bring several tokens of it: as many as were guessed right, and one."""

    def add(self, prompt: list[int], *rest: Any) -> int:
        """As DecodingLoop.add."""
        self._lookup = PromptLookup(prompt, self._runner.price(self._cache))
        return super().add(prompt, *rest)

    @torch.inference_mode()
    def _advance(self) -> None:
        row = self._rows[0]
        self._guesses = self._lookup.guess(self._cache.length - row.length) if row.begun else []
        tried = [] if self._stepped else self._guesses  # a step queued before there was a guess is waited for
        if tried:
            self._try(tried)
        else:
            super()._advance()
        self._lookup.settle(len(tried), len(self._ready) - 1)
        for _, _, token in self._ready:
            self._lookup.append(token)

    def _may_queue(self) -> bool:
        return super()._may_queue() and not self._guesses

    def _try(self, guesses: list[int]) -> None:
        """Feed the last token and guesses after it; what is chosen up to the first wrong one is ready."""
        row, cache = self._rows[0], self._cache.view(rows=slice(1))
        place = row.length - 1
        fed = torch.tensor([[row.last, *guesses]], device=self._device)
        tokens = self._chooser.confirm(self._runner.verify(fed, place, cache), guesses, place)
        self._tokens = torch.tensor(tokens[-1:], device=self._device)
        self._ready.extend((0, row, token) for token in tokens)
        self._read_at = time.perf_counter()
        self._step = None  # one that goes on by itself has missed these tokens
