"""One row of a generation, as the host knows it: what is asked of it, its text as it comes, and why it ended."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from minisa.cache import StaticCache
from minisa.device import peak_memory
from minisa.generation.options import Options
from minisa.text.tokenizer import TextStream

FinishReason = Literal["stop", "length", "context"]


@dataclass(frozen=True, slots=True)
class Stats:
    """How one row went. Prefill and decoding are never mixed.

    Times are those of whoever reads the row: in a batch it waits while other rows' prompts are computed, before its
    first token and after it, and that counts.
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
    text: may be empty; half a UTF-8 character, or what may turn out to be a stop string, is held back.
    finish_reason: None until the row's last chunk, then "stop" (a stop id or stop string), "length" (max_new_tokens)
        or "context" (the cache is full); stats come with it.
    """

    row: int
    token: int
    text: str
    finish_reason: FinishReason | None = None
    stats: Stats | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Prefix:
    """A beginning that prompts share: a one-row cache of its keys and values, and the model they were computed by."""

    cache: StaticCache
    model: object


class Row:
    """A prompt and its continuation so far. number: what its chunks carry. stream: its text as tokens come.
    max_length: tokens the cache has room for."""

    def __init__(self, number: int, prompt: list[int], options: Options, stream: TextStream, max_length: int) -> None:
        self.number = number
        self.prompt = prompt
        self.options = options
        self.reused = 0  # tokens of the prompt that need not be computed
        self.length = len(prompt)  # tokens so far; the last one chosen is not in the cache yet
        self.last: int | None = None
        self.finished: FinishReason | None = None
        self.began = time.perf_counter()
        self.first_token_time = 0.0
        self._stop_ids = frozenset(options.stop_ids or ())
        self._stream = stream
        self._stops = StopStrings(options.stops)
        self._max_length = max_length

    @property
    def begun(self) -> bool:
        """Whether its prompt is in the cache and its first token chosen."""
        return self.first_token_time > 0

    def take(self, token: int) -> str:
        """Count the token in, decide whether the row ends with it, and return the text that is certain."""
        self.last = token
        self.length += 1
        limit = self.options.max_new_tokens
        if token in self._stop_ids:
            self.finished = "stop"
            return self._rest()
        text = self._stops.feed(self._stream.feed(token))
        if self._stops.found:
            self.finished = "stop"
        elif limit is not None and self.length - len(self.prompt) >= limit:
            self.finished = "length"
        elif self.length > self._max_length:
            self.finished = "context"
        return text if self.finished in (None, "stop") else text + self._rest()

    def _rest(self) -> str:
        """What was held back, when no more tokens come."""
        return self._stops.feed(self._stream.flush()) + self._stops.flush()

    def stats(self, now: float, device: torch.device) -> Stats:
        new_tokens = self.length - len(self.prompt)
        until_first = self.first_token_time - self.began
        return Stats(
            prompt_tokens=len(self.prompt),
            reused_tokens=self.reused,
            new_tokens=new_tokens,
            time_to_first_token=until_first,
            prompt_tokens_per_second=(len(self.prompt) - self.reused) / until_first,
            tokens_per_second=(new_tokens - 1) / (now - self.first_token_time) if new_tokens > 1 else 0.0,
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
        self.found = bool(starts)
        return self._release(min(starts) if starts else len(self._held) - self._unfinished())

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        return "" if self.found else self._release(len(self._held))

    def _unfinished(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        ends = range(min(longest, len(self._held)), 0, -1)
        return next((n for n in ends if any(stop.startswith(self._held[-n:]) for stop in self._stops)), 0)

    def _release(self, length: int) -> str:
        released, self._held = self._held[:length], self._held[length:]
        return released
