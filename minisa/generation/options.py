"""What a generation may be asked for; every option is checked here, once, before anything is computed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from minisa.errors import MinisaError

if TYPE_CHECKING:
    from minisa.generation.row import Prefix


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen. temperature 0 is greedy: the filters then have no say.

    top_k 0, top_p 1, min_p 0 and repetition_penalty 1 are off.
    Raises MinisaError, naming the option, for a value out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature != 0:  # what fp32 can tell from 0 and from infinity, also divided into logits
            _check("temperature", self.temperature, 1e-4, 1e4, "0 (greedy), or 0.0001 to 10000")
        _check("top_k", self.top_k, 0, math.inf, "a whole number, 0 (off) or more", int)
        _check("top_p", self.top_p, 1e-6, 1, "0.000001 to 1 (off)")
        _check("min_p", self.min_p, 0, 1, "0 (off) to 1")
        _check("repetition_penalty", self.repetition_penalty, 1e-9, 1e9, "1e-9 to 1e9; 1 is off")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


@dataclass(frozen=True, slots=True)
class Options(Sampling):
    """A Sampling, and how a generation goes and ends.

    seed: one number for every row, one a row, or None for a fresh one each time.
    max_new_tokens: None goes on to the end of the context.
    stop: a string or several that end a row; text from the first of them on is not given out.
    stop_ids: tokens that end a row; None for the model's own.
    prefix: from `LLM.prefix`; what a prompt has in common with it is not computed again.
    speculate: guess tokens from the text so far (speculate.py) and check several in a step, for one prompt: the same
        text, sooner where it repeats.
    """

    seed: int | Sequence[int] | None = None
    max_new_tokens: int | None = None
    stop: str | Sequence[str] = ()
    stop_ids: Iterable[int] | None = None
    prefix: Prefix | None = None
    speculate: bool = False

    def __post_init__(self) -> None:
        Sampling.__post_init__(self)
        for seed in self.seed if isinstance(self.seed, Sequence) else [self.seed]:
            if seed is not None:
                _check("seed", seed, -(1 << 63), (1 << 63) - 1, "a 64-bit whole number", int)
        if self.max_new_tokens is not None:
            _check("max_new_tokens", self.max_new_tokens, 1, math.inf, "1 or more", int)
        if not isinstance(self.stop, Sequence) or not all(isinstance(text, str) for text in self.stop):
            raise MinisaError(f"stop is {self.stop!r}: expected a string, or several")
        if "" in self.stops:
            raise MinisaError("stop: an empty stop string would stop at once; leave it out")

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def sampling(self) -> Sampling:
        """What all rows of a batch have in common."""
        return Sampling(self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty)

    def seeds(self, batch: int) -> list[int | None]:
        """The seed of every row. Raises MinisaError if a list of them is not one a row."""
        seeds: list[int | None] = list(self.seed) if isinstance(self.seed, Sequence) else [self.seed] * batch
        if len(seeds) != batch:
            raise MinisaError(f"seed: {len(seeds)} seeds for {batch} prompts: expected one number or one a prompt")
        return seeds


def _check(option: str, value: object, low: float, high: float, expected: str, kind: type = float) -> None:
    number = isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
    if not number or not low <= value <= high:  # type: ignore[operator]
        raise MinisaError(f"{option} is {value!r}: expected {expected}")
