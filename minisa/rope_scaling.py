"""How RoPE's frequencies are stretched for long contexts, as a checkpoint's description says."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from minisa.descriptions import Raw, integer, number, within
from minisa.errors import MinisaError

ROPE_FACTORS = (1e-3, 1e6)  # beyond these fp32 loses the angles; the largest published are 32 and a base of 4.5e10


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How rotary frequencies are stretched for long contexts.

    kind "linear": every frequency divided by `factor`.
    kind "llama3": Llama 3.1's rule; wavelengths beyond original_max_seq_len / low_freq_factor are divided by
        `factor`, those below original_max_seq_len / high_freq_factor are kept, between them interpolated.
    kind "factors": one divisor for each frequency, as GGUF files carry them (rope_freqs.weight).
    kind "yarn": frequencies that make fewer than beta_slow turns over the original context are divided by `factor`,
        those that make more than beta_fast are kept, between them interpolated; queries and keys grow by
        attention_factor (arXiv 2309.00071).
    """

    kind: Literal["linear", "llama3", "factors", "yarn"]
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_seq_len: int = 8192
    factors: tuple[float, ...] = ()
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0

    def __post_init__(self) -> None:
        """Raises MinisaError for a number that would make a frequency infinite, none or NaN."""
        for key in ("factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "attention_factor"):
            within(f"rope_scaling: {key}", getattr(self, key), ROPE_FACTORS)
        for factor in self.factors:
            within("rope_freqs.weight: a factor", factor, ROPE_FACTORS)
        if self.low_freq_factor >= self.high_freq_factor:
            raise MinisaError(
                f"rope_scaling: low_freq_factor is {self.low_freq_factor}: expected less than high_freq_factor, which "
                f"is {self.high_freq_factor}"
            )

    def yarn_ramp(self, theta: float, head_dim: int) -> tuple[int, int]:
        """The rotary pairs between which YaRN goes from frequencies as they were to divided ones.

        Raises MinisaError where there are none.
        """

        def pair(turns: float) -> float:  # the one that makes so many turns over the original context
            inverse = self.original_max_seq_len / (2 * math.pi * turns)  # of its frequency
            return head_dim * math.log(inverse) / (2 * math.log(max(theta, 1.001)))

        first, last = max(math.floor(pair(self.beta_fast)), 0), min(math.ceil(pair(self.beta_slow)), head_dim - 1)
        if first >= last:
            raise MinisaError(
                f"rope_scaling: yarn from rotary pair {first} to {last}: expected an original context, a rope_theta "
                "and betas that leave some between them"
            )
        return first, last


def read_rope_scaling(raw: Raw, max_seq_len: int) -> RopeScaling | None:
    """What config.json calls rope_scaling or rope_parameters; None where it asks for nothing.

    max_seq_len: the model's context. Of kind "dynamic" is what goes beyond it, which minisa never does.
    Raises MinisaError for a kind that is not known, and for numbers that are missing or beyond bounds.
    """
    kind = raw.get("rope_type", raw.get("type", "default"))
    if kind in ("default", "none"):
        return None
    if kind == "dynamic":
        within("rope_scaling: factor", number(raw, "factor"), ROPE_FACTORS)
        return None
    if kind == "linear":
        return RopeScaling("linear", factor=number(raw, "factor"))
    if kind == "llama3":
        return RopeScaling(
            "llama3",
            factor=number(raw, "factor"),
            low_freq_factor=number(raw, "low_freq_factor"),
            high_freq_factor=number(raw, "high_freq_factor"),
            original_max_seq_len=integer(raw, "original_max_position_embeddings", max_seq_len),
        )
    if kind == "yarn":
        if raw.get("truncate") not in (None, True):
            raise MinisaError("rope_scaling: truncate is false: expected yarn with whole rotary pairs")
        original = integer(raw, "original_max_position_embeddings", max_seq_len)
        factor = number(raw, "factor", max_seq_len / original)
        return RopeScaling(
            "yarn",
            factor=factor,
            original_max_seq_len=original,
            beta_fast=number(raw, "beta_fast", 32.0),
            beta_slow=number(raw, "beta_slow", 1.0),
            attention_factor=number(raw, "attention_factor", _yarn_attention(raw, factor)),
        )
    raise MinisaError(f"rope_scaling type {kind!r} is not supported: expected 'dynamic', 'linear', 'llama3' or 'yarn'")


def _yarn_attention(raw: Raw, factor: float) -> float:
    """What YaRN's authors and DeepSeek's multiply queries and keys by, where a file does not say."""
    growth = 0.1 * math.log(max(factor, 1.0))
    over, under = number(raw, "mscale", 0.0), number(raw, "mscale_all_dim", 0.0)
    return (1 + over * growth) / (1 + under * growth) if over and under else 1 + growth
