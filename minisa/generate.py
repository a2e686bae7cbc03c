"""The streaming generator: token ids in, small records of text out.

The only wait for the device is to read the tokens just chosen; on a GPU the next step is queued before that.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from minisa.cache import StaticCache
from minisa.device import begin_reading, peak_memory
from minisa.errors import MinisaError
from minisa.runners import Runner
from minisa.sampling import Chooser, Sampling
from minisa.speculate import PromptLookup
from minisa.tokenizer import Tokenizer

FinishReason = Literal["stop", "length", "context"]


@dataclass(frozen=True, slots=True)
class Stats:
    """How one row went. Prefill and decoding are never mixed."""

    prompt_tokens: int
    reused_tokens: int  # of the prompt, found in the cache or in a prefix
    new_tokens: int
    time_to_first_token: float  # seconds from the call
    prompt_tokens_per_second: float  # of the tokens that were not reused
    tokens_per_second: float  # after the first token; 0 when there was only one
    peak_memory: int  # bytes: the device's allocator on a GPU, the process on the CPU


@dataclass(frozen=True, slots=True)
class Chunk:
    """One token of one row, and the text that is certain by now.

    The text may be empty: half a UTF-8 character, or what may turn out to be a stop string, is held back.
    finish_reason: None until the row's last chunk, then "stop" (a stop id or stop string), "length" (max_new_tokens)
    or "context" (the cache is full); stats come with it.
    """

    row: int
    token: int
    text: str
    finish_reason: FinishReason | None = None
    stats: Stats | None = None


@dataclass(frozen=True, slots=True)
class Options:
    """How a generation goes and ends.

    max_new_tokens: None goes on to the end of the context. stop: strings that end a row; text from the first of them
    on is not given out. stop_ids: tokens that end a row. mid_text: the text goes on from the prompt's, so that a
    leading space belongs to it; False for an answer, which is a text of its own. speculate: guess tokens from the text
    so far (speculate.py) and check several in a step: the same text, sooner where it repeats; for a single prompt.
    Raises MinisaError, naming the option, for a value out of range.
    """

    sampling: Sampling = field(default_factory=Sampling)
    max_new_tokens: int | None = None
    stop: Sequence[str] = ()
    stop_ids: frozenset[int] = frozenset()
    mid_text: bool = True
    speculate: bool = False

    def __post_init__(self) -> None:
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise MinisaError(f"max_new_tokens is {self.max_new_tokens}: expected 1 or more")
        if "" in self.stop:
            raise MinisaError("stop: an empty stop string would stop at once; leave it out")


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Prefix:
    """A beginning that prompts have in common: its tokens, and the one-row cache that holds their keys and values."""

    tokens: list[int]
    cache: StaticCache


@torch.inference_mode()
def compute_prefix(runner: Runner, cache: StaticCache, tokens: list[int]) -> Prefix:
    """Feed tokens to an empty cache of one row, long enough for them."""
    runner.prefill(torch.tensor([tokens], device=cache.values.device), 0, cache)
    return Prefix(tokens, cache)


@torch.inference_mode()
def generate(
    runner: Runner,
    cache: StaticCache,
    tokenizer: Tokenizer,
    prompts: Sequence[list[int]],
    options: Options,
    cached: list[int] | None = None,
    prefix: Prefix | None = None,
) -> Iterator[Chunk]:
    """Yield the chunks of every prompt's continuation, one token of each unfinished row at a time.

    prompts: one row of the cache each, from the first on; each is prefilled by itself, so a row's result is that of the
        row run alone.
    cached: for a single prompt, the tokens that the cache holds; its common prefix with the prompt is not fed again,
        and the list is kept up to date whenever the generator pauses or is closed.
    prefix: what a prompt has in common with it is copied into its row, where the cache does not hold more already.
    """
    began = time.perf_counter()
    device = cache.values.device
    choose = Chooser.begin(options.sampling, prompts, cache.length, runner.model.config.vocab_size, device)
    step = runner.stepper(cache, choose)
    rows = [_Row(len(prompt), tokenizer, options, cache.length) for prompt in prompts]

    if cached is not None:
        rows[0].reused = common_prefix(cached, prompts[0][:-1])
        del cached[rows[0].reused :]
    logits = []
    for i, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
        own = cache.view(rows=slice(i, i + 1))
        if prefix is not None and (common := common_prefix(prefix.tokens, prompt[:-1])) > row.reused:
            own.view(common).copy_(prefix.cache.view(common))
            row.reused = common
        logits.append(runner.prefill(torch.tensor([prompt[row.reused :]], device=device), row.reused, own))
    if cached is not None:
        cached[:] = prompts[0]
    positions = torch.tensor([len(prompt) for prompt in prompts], device=device)  # where the next tokens go
    tokens = choose(torch.cat(logits), positions - 1)
    if options.speculate:
        first = int(tokens)
        yield from _with_guesses(runner, cache.view(rows=slice(1)), choose, prompts[0], first, rows[0], cached, began)
        return

    first_token_at = 0.0
    while True:
        chosen_tokens = begin_reading(tokens)
        ahead = None
        in_use = 1 + max(row.length for row in rows if row.finished is None)
        if runner.queues and in_use <= cache.length:
            ahead = step(tokens, positions, in_use)
        chosen = chosen_tokens()
        now = time.perf_counter()
        first_token_at = first_token_at or now
        for i, row in enumerate(rows):
            if row.finished is None:
                text = row.take(chosen[i])
                stats = None if row.finished is None else row.stats(began, first_token_at, now, device)
                yield Chunk(i, chosen[i], text, row.finished, stats)
        unfinished = [row.length for row in rows if row.finished is None]
        if not unfinished:
            return
        tokens, positions = ahead or step(tokens, positions, max(unfinished))
        if cached is not None:
            cached.append(chosen[0])


def _with_guesses(
    runner: Runner,
    cache: StaticCache,
    choose: Chooser,
    prompt: list[int],
    first: int,
    row: _Row,
    cached: list[int] | None,
    began: float,
) -> Iterator[Chunk]:
    """The chunks of one row from its first token on; as many of a step's tokens as were guessed right, and one."""
    device = cache.values.device
    lookup = PromptLookup(prompt)
    first_token_at = time.perf_counter()
    step = None
    chosen = [first]
    while True:
        now = time.perf_counter()
        for number, token in enumerate(chosen):
            if cached is not None and number:
                cached.append(chosen[number - 1])
            text = row.take(token)
            lookup.append(token)
            stats = None if row.finished is None else row.stats(began, first_token_at, now, device)
            yield Chunk(0, token, text, row.finished, stats)
            if row.finished is not None:
                return
        last, place = chosen[-1], row.length - 1  # the last token chosen, and its position: it is not in the cache yet
        guesses = lookup.guess(cache.length - row.length)
        if guesses:
            step = None  # one that goes on by itself has missed these tokens
            fed = torch.tensor([[last, *guesses]], device=device)
            logits = torch.cat(list(runner.all_logits(fed, place, cache)))
            chosen = []
            for i in range(len(guesses) + 1):
                chosen.append(int(choose(logits[i : i + 1], torch.tensor([place + i], device=device))))
                if guesses[i : i + 1] != chosen[-1:]:
                    break
        else:
            if step is None:
                step = runner.stepper(cache, choose)
                tokens, positions = torch.tensor([[last], [place]], device=device)
            tokens, positions = step(tokens, positions, row.length)
            chosen = [int(tokens)]
            if choose.seen is not None:
                choose.seen[0, chosen[0]] = True  # a graph keeps its own account
        lookup.settle(len(guesses), len(chosen) - 1)
        if cached is not None:
            cached.append(last)


class _Row:
    """What is known on the host of one row: its length, its text so far, and why it ended."""

    def __init__(self, prompt_tokens: int, tokenizer: Tokenizer, options: Options, max_length: int) -> None:
        self.prompt_tokens = prompt_tokens
        self.reused = 0  # tokens of the prompt that need not be computed
        self.length = prompt_tokens  # tokens so far; the last one chosen is not in the cache yet
        self.finished: FinishReason | None = None
        self._options = options
        self._max_length = max_length
        self._stream = tokenizer.stream(mid_text=options.mid_text)
        self._stops = StopStrings(options.stop)

    def take(self, token: int) -> str:
        """Count the token in, decide whether the row ends with it, and return the text that is certain."""
        self.length += 1
        options = self._options
        if token in options.stop_ids:
            self.finished = "stop"
            return self._stops.feed(self._stream.flush()) + self._stops.flush()
        text = self._stops.feed(self._stream.feed(token))
        if self._stops.found:
            self.finished = "stop"
        elif options.max_new_tokens is not None and self.length - self.prompt_tokens >= options.max_new_tokens:
            self.finished = "length"
        elif self.length > self._max_length:
            self.finished = "context"
        if self.finished in ("length", "context"):
            text += self._stops.feed(self._stream.flush()) + self._stops.flush()
        return text

    def stats(self, began: float, first_token_at: float, now: float, device: torch.device) -> Stats:
        new_tokens = self.length - self.prompt_tokens
        return Stats(
            prompt_tokens=self.prompt_tokens,
            reused_tokens=self.reused,
            new_tokens=new_tokens,
            time_to_first_token=first_token_at - began,
            prompt_tokens_per_second=(self.prompt_tokens - self.reused) / (first_token_at - began),
            tokens_per_second=(new_tokens - 1) / (now - first_token_at) if new_tokens > 1 else 0.0,
            peak_memory=peak_memory(device),
        )


class StopStrings:
    """Text passes through until a stop string is complete; what may be the beginning of one is held back."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.found = False
        self._stops = tuple(stops)
        self._held = ""

    def feed(self, text: str) -> str:
        """The text that is certain; what follows a stop string is dropped."""
        if self.found:
            return ""
        self._held += text
        starts = [start for stop in self._stops if (start := self._held.find(stop)) >= 0]
        if starts:
            self.found = True
            return self._release(min(starts))
        return self._release(len(self._held) - self._longest_beginning())

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        return "" if self.found else self._release(len(self._held))

    def _longest_beginning(self) -> int:
        """Length of the longest end of the text held that begins a stop string."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stops):
                return length
        return 0

    def _release(self, length: int) -> str:
        released, self._held = self._held[:length], self._held[length:]
        return released


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """How many tokens two sequences begin with alike."""
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))
