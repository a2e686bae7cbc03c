"""One row of a generation, as the host knows it: what is asked of it, its text as it comes, and why it ended."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Literal

import torch

from minisa.cache import StaticCache
from minisa.costs import SLACK
from minisa.device import peak_memory
from minisa.errors import MinisaError, shown
from minisa.generation.sampling import Sampling, SamplingOptions, check_number
from minisa.text.tokenizer import Tokenizer

WRITTEN_AHEAD = 16  # positions, at most, after the last token of a row that a step may have written to: wrong guesses

FinishReason = Literal["stop", "length", "context"]


@dataclass(frozen=True, slots=True)
class Stats:
    """How one row went. Prefill and decoding are never mixed.

    Times are those of who reads the row: in a batch it waits while prompts of other rows are computed, before its first
    token and after it, and that counts.
    """

    prompt_tokens: int
    reused_tokens: int  # of the prompt, found in the cache or in a prefix
    new_tokens: int
    time_to_first_token: float  # seconds since the first chunk was asked for, or since the row's own `add`
    prompt_tokens_per_second: float  # of the tokens that were not reused, in that time
    tokens_per_second: float  # after the first token; 0 when there was only one
    peak_memory: int  # bytes: the device's allocator on a GPU, the process on the CPU


@dataclass(frozen=True, slots=True)
class Chunk:
    """One token of one row, and the text that is certain by now.

    row: the prompt's place in the call, or what `Batch.add` returned for it.
    The text may be empty: half a UTF-8 character, or what may turn out to be a stop string, is held back.
    finish_reason: None until the row's last chunk, then "stop" (a stop id or stop string), "length" (max_new_tokens)
    or "context" (the cache is full); stats come with it.
    """

    row: int
    token: int
    text: str
    finish_reason: FinishReason | None = None
    stats: Stats | None = None


class GenerationOptions(SamplingOptions, total=False):
    """What `LLM.generate` and `chat` take beside the prompt."""

    max_new_tokens: int | None
    stop: str | Sequence[str]
    stop_ids: Iterable[int] | None
    prefix: Prefix | None
    speculate: bool


@dataclass(frozen=True, slots=True)
class Options:
    """How a generation goes and ends.

    max_new_tokens: None goes on to the end of the context. stop: strings that end a row; text from the first of them
    on is not given out. stop_ids: tokens that end a row. mid_text: the text goes on from the prompt's, so that a
    leading space belongs to it; False for an answer, which is a text of its own. speculate: guess tokens from the text
    so far (speculate.py) and check several in a step: the same text, sooner where it repeats, for one prompt.
    Raises MinisaError, naming the option, for a value out of range.
    """

    sampling: Sampling = field(default_factory=Sampling)
    max_new_tokens: int | None = None
    stop: Sequence[str] = ()
    stop_ids: frozenset[int] = frozenset()
    mid_text: bool = True
    speculate: bool = False

    def __post_init__(self) -> None:
        if self.max_new_tokens is not None:
            check_number("max_new_tokens", self.max_new_tokens, 1, math.inf, "1 or more", Integral)
        if not all(isinstance(text, str) for text in self.stop):
            raise MinisaError(f"stop is {shown(self.stop)}: expected a string, or several")
        if "" in self.stop:
            raise MinisaError("stop: an empty stop string would stop at once; leave it out")


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Prefix:
    """A beginning that prompts have in common: its tokens, and the one-row cache that holds their keys and values."""

    tokens: list[int]
    cache: StaticCache


class Row:
    """A prompt and its continuation so far.

    held: the tokens that its row of the cache holds, in a list that is kept up to date; what they have in common with
    the prompt is not fed again. prefix: likewise, once it is copied.
    """

    def __init__(
        self, number: int, prompt: list[int], options: Options, tokenizer: Tokenizer, max_length: int,
        held: list[int] | None, prefix: Prefix | None,
    ) -> None:  # fmt: skip
        self.number = number
        self.prompt = prompt
        self.sampling = options.sampling
        self.held = [] if held is None else held
        self.prefix = prefix
        self.reused = 0  # tokens of the prompt that need not be computed
        self.length = len(prompt)  # tokens so far; the last one chosen is not in the cache yet
        self.last: int | None = None
        self.finished: FinishReason | None = None
        self.began = time.perf_counter()
        self.first_token_at = 0.0
        self._options = options
        self._max_length = max_length
        self._stream = tokenizer.stream(mid_text=options.mid_text)
        self._stops = StopStrings(options.stop)

    @property
    def begun(self) -> bool:
        """Whether its prompt is in the cache and its first token chosen."""
        return self.first_token_at > 0

    def take(self, token: int) -> str:
        """Count the token in, decide whether the row ends with it, and return the text that is certain."""
        if self.last is not None:
            self.held.append(self.last)
        self.last = token
        self.length += 1
        options = self._options
        if token in options.stop_ids:
            self.finished = "stop"
            return self._stops.feed(self._stream.flush()) + self._stops.flush()
        text = self._stops.feed(self._stream.feed(token))
        if self._stops.found:
            self.finished = "stop"
        elif options.max_new_tokens is not None and self.length - len(self.prompt) >= options.max_new_tokens:
            self.finished = "length"
        elif self.length > self._max_length:
            self.finished = "context"
        if self.finished in ("length", "context"):
            text += self._stops.feed(self._stream.flush()) + self._stops.flush()
        return text

    def stats(self, now: float, device: torch.device) -> Stats:
        new_tokens = self.length - len(self.prompt)
        until_first = self.first_token_at - self.began
        return Stats(
            prompt_tokens=len(self.prompt),
            reused_tokens=self.reused,
            new_tokens=new_tokens,
            time_to_first_token=until_first,
            prompt_tokens_per_second=(len(self.prompt) - self.reused) / until_first,
            tokens_per_second=(new_tokens - 1) / (now - self.first_token_at) if new_tokens > 1 else 0.0,
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


def reusable(cache: StaticCache, held: Sequence[int], prompt: Sequence[int]) -> int:
    """How many of the prompt's first tokens a cache whose row holds `held` has what the next ones must see.

    All that they have in common but the prompt's last, for its logits. A ring has them all or nothing to offer: nothing
    where more was written after them than its slack, or would still be there after the prompt.
    """
    common = common_prefix(held, prompt[:-1])
    written = len(held) + WRITTEN_AHEAD
    if not cache.wraps or written <= cache.slots:
        return common
    return common if written - common <= SLACK and len(prompt) >= len(held) else 0


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """How many tokens two sequences begin with alike."""
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))
