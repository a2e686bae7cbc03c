"""Prompt lookup: guesses of what comes next, copied from where the text last went the same way.

A step that feeds several guessed tokens at once costs little more than one that feeds one, and tells which of them the
model would have chosen itself. Text that repeats (code, quotations, lists) comes several tokens a step; the text is
the same (for near ties see DecodingLoop). After Saxena, https://github.com/apoorvumang/prompt-lookup-decoding
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

NGRAM = 3  # tokens that must agree before what followed them is guessed
MAX_GUESSES = 6  # tokens guessed at once
EARNED = 0.02  # speculation budget earned by each token that comes, in steps
SPARE = 3  # attempts beside the next that the budget may hold
TRIED = 2  # guesses that an answer may risk before it has earned any; right ones soon pay for more


class Price(NamedTuple):
    """What a step that guesses costs more than one that does not, in steps: attempt, whatever it guesses, and guess
    for each token of it."""

    attempt: float
    guess: float

    def of(self, guesses: int) -> float:
        return self.attempt + self.guess * guesses if guesses else 0.0

    @property
    def max_budget(self) -> float:
        """Steps that right guesses may earn at most: where an attempt has its price, several more."""
        return self.of(MAX_GUESSES) + SPARE * self.attempt

    def affordable(self, budget: float, limit: int) -> int:
        """How many guesses, up to a limit, a budget of steps pays for; where one more is free, MAX_GUESSES or none."""
        if budget < self.attempt or (not self.guess and limit < MAX_GUESSES):
            return 0
        return min(limit, MAX_GUESSES, int((budget - self.attempt) / self.guess)) if self.guess else MAX_GUESSES


PRICE = Price(0.0, 0.3)  # on a CPU: more than any measured on one core (0.21) or two (0.28)


class PromptLookup:
    """Guesses for one row. What wrong guesses cost is bounded by what the text, and right ones, have earned.

    price: None where guesses never pay. tried: guesses that may be risked before any have been right.
    """

    def __init__(self, tokens: Sequence[int], price: Price | None = PRICE, tried: int = TRIED) -> None:
        self._tokens: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}  # where the text went on after its last NGRAM tokens
        self._found: int | None = None
        self._price = price
        self._budget = 0.0 if price is None else price.of(tried)  # steps that may be risked now
        for token in tokens:
            self.append(token)

    def append(self, token: int) -> None:
        """The text has grown by a token."""
        self._tokens.append(token)
        if len(self._tokens) >= NGRAM:
            key = tuple(self._tokens[-NGRAM:])
            self._found = self._after.get(key)
            self._after[key] = len(self._tokens)

    def guess(self, limit: int) -> list[int]:
        """Up to `limit` tokens that may come next; none where the text has not been here before."""
        if self._price is None or self._found is None:
            return []
        guesses: list[int] = []
        for place in range(self._found, self._found + self._price.affordable(self._budget, limit)):
            beyond = place - len(self._tokens)  # a short cycle is copied more than once
            guesses.append(guesses[beyond] if beyond >= 0 else self._tokens[place])
        return guesses

    def settle(self, guessed: int, right: int) -> None:
        """After a step: how many tokens it was fed as guesses, and how many of these were right."""
        if self._price is not None:
            earned = right + EARNED * (right + 1)
            self._budget = min(self._budget + earned - self._price.of(guessed), self._price.max_budget)
