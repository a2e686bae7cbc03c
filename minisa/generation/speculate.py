"""Prompt lookup: guesses of what comes next, copied from where the text last went the same way.

A step that feeds several guessed tokens at once costs little more than one that feeds one, and tells which of them the
model would have chosen itself. Text that repeats (code, quotations, lists) comes several tokens a step; the text is
the same (for near ties see DecodingLoop). After Saxena, https://github.com/apoorvumang/prompt-lookup-decoding
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

NGRAM = 3  # tokens that must agree before what followed them is guessed
LONGEST = 6  # tokens guessed at once
EARNED = 0.02  # of a step, to be risked on guesses, for every token that comes
SPARE = 3  # attempts beside the next that may be paid for
TRIED = 2  # guesses that an answer may risk before it has earned any; right ones soon pay for more


class Price(NamedTuple):
    """What a step that guesses ahead costs more than one that does not, in steps: attempt, whatever it guesses, and
    guess for each token of it."""

    attempt: float
    guess: float

    def of(self, guesses: int) -> float:
        return self.attempt + self.guess * guesses if guesses else 0.0

    @property
    def most(self) -> float:
        """Steps that right guesses may earn at most: where an attempt has its price, several more."""
        return self.of(LONGEST) + SPARE * self.attempt

    def affordable(self, credit: float, most: int) -> int:
        """How many guesses, at most so many, that many steps pay for; where one more costs nothing, LONGEST or none."""
        if credit < self.attempt or (not self.guess and most < LONGEST):
            return 0
        return min(most, LONGEST, int((credit - self.attempt) / self.guess)) if self.guess else LONGEST


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
        self._credit = 0.0 if price is None else price.of(tried)  # steps that may be risked now
        for token in tokens:
            self.append(token)

    def append(self, token: int) -> None:
        """The text has grown by a token."""
        self._tokens.append(token)
        if len(self._tokens) >= NGRAM:
            key = tuple(self._tokens[-NGRAM:])
            self._found = self._after.get(key)
            self._after[key] = len(self._tokens)

    def guess(self, most: int) -> list[int]:
        """At most so many tokens that may come next; none where the text has not been here before."""
        if self._price is None or self._found is None:
            return []
        guesses: list[int] = []
        for place in range(self._found, self._found + self._price.affordable(self._credit, most)):
            beyond = place - len(self._tokens)  # a short circle is gone round more than once
            guesses.append(guesses[beyond] if beyond >= 0 else self._tokens[place])
        return guesses

    def settle(self, guessed: int, right: int) -> None:
        """After a step: how many tokens it was fed as guesses, and how many of these were right."""
        if self._price is not None:
            earned = right + EARNED * (right + 1)
            self._credit = min(self._credit + earned - self._price.of(guessed), self._price.most)
