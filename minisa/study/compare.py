"""Scores of several variants on the same items: means with standard errors, and paired differences.

Every metric is a ratio of two sums over items, Σ numerator / Σ denominator: right answers over answers, nats over
tokens, F1's counts. So one formula gives every standard error: that of the mean of the linearized residuals
(numerator − ratio · denominator) / mean denominator. Differences are paired: taken item by item, so that what makes
an item hard for everyone cancels.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

Pair = tuple[float, float]  # numerator and denominator of one item


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value and its standard error, which is NaN for a single item."""

    value: float
    stderr: float

    def exp(self) -> Estimate:
        """Of exp(value), to first order: a mean loss becomes a perplexity."""
        return Estimate(exp(self.value), exp(self.value) * self.stderr)


def exp(value: float) -> float:
    """math.exp, infinite where that overflows."""
    return math.exp(value) if value < 709 else value * math.inf


def ratio(items: Sequence[Pair]) -> Estimate:
    """Σ numerator / Σ denominator. NaN where no item counts."""
    value, residuals = _linearized(items)
    return Estimate(value, _standard_error(residuals))


def paired_difference(items: Sequence[Pair], reference: Sequence[Pair]) -> Estimate:
    """The ratio of `items` less that of `reference`, both over the same items in the same order."""
    (value, mine), (reference_value, theirs) = _linearized(items), _linearized(reference)
    return Estimate(value - reference_value, _standard_error([a - b for a, b in zip(mine, theirs, strict=True)]))


def _linearized(items: Sequence[Pair]) -> tuple[float, list[float]]:
    """The ratio, and each item's residual."""
    mean = math.fsum(denominator for _, denominator in items) / len(items)
    if not mean:
        return math.nan, [math.nan] * len(items)
    value = math.fsum(numerator for numerator, _ in items) / len(items) / mean
    return value, [(numerator - value * denominator) / mean for numerator, denominator in items]


def _standard_error(values: Sequence[float]) -> float:
    if len(values) < 2 or any(map(math.isnan, values)):
        return math.nan
    return statistics.stdev(values) / math.sqrt(len(values))
