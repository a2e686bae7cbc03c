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
        value = exp(self.value)
        return Estimate(value, value * self.stderr)


def exp(value: float) -> float:
    """math.exp, infinite where that overflows."""
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


def ratio(items: Sequence[Pair]) -> Estimate:
    """Σ numerator / Σ denominator. NaN where no item counts."""
    value = _ratio(items)
    return Estimate(value, _standard_error(_residuals(items, value)))


def paired_difference(items: Sequence[Pair], reference: Sequence[Pair]) -> Estimate:
    """The ratio of `items` less that of `reference`, both over the same items in the same order."""
    value, reference_value = _ratio(items), _ratio(reference)
    residuals = zip(_residuals(items, value), _residuals(reference, reference_value), strict=True)
    return Estimate(value - reference_value, _standard_error([mine - theirs for mine, theirs in residuals]))


def _ratio(items: Sequence[Pair]) -> float:
    total = math.fsum(denominator for _, denominator in items)
    return math.fsum(numerator for numerator, _ in items) / total if total else math.nan


def _residuals(items: Sequence[Pair], value: float) -> list[float]:
    mean = math.fsum(denominator for _, denominator in items) / len(items)
    return [(numerator - value * denominator) / mean if mean else math.nan for numerator, denominator in items]


def _standard_error(values: Sequence[float]) -> float:
    if len(values) < 2 or any(map(math.isnan, values)):
        return math.nan
    return statistics.stdev(values) / math.sqrt(len(values))
