"""ModelConfig: the shape of a Llama-architecture model, as checkpoint/description.py reads it from its files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from minisa.errors import MinisaError

MAX_LAYERS = 1024  # sanity bounds for headers that lie; the largest Llama has 126 layers, and each takes a millisecond
MAX_WIDTH = 1 << 24
ROPE_THETAS = (1.0, 1e12)  # the largest published is 4.5e10
ROPE_FACTORS = (1e-3, 1e6)  # beyond these fp32 loses the angles; the largest published is 32
NORM_EPSILONS = (1e-12, 1.0)


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


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The shape of a dense Llama or Mistral model.

    Raises MinisaError on construction when the numbers cannot belong to such a model.
    """

    dim: int  # width of the residual stream
    n_layers: int
    n_heads: int  # query heads
    n_kv_heads: int  # key and value heads; each serves n_heads / n_kv_heads query heads
    head_dim: int
    hidden_dim: int  # width inside the feed-forward block
    vocab_size: int
    max_seq_len: int = 4096  # tokens of context the model was trained for
    norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    tie_embeddings: bool = False  # the output head is the embedding matrix
    sliding_window: int | None = None  # tokens a query can look back over, itself included

    def __post_init__(self) -> None:
        for key in ("dim", "n_heads", "n_kv_heads", "head_dim", "hidden_dim", "vocab_size", "max_seq_len"):
            bounded(key, getattr(self, key), MAX_WIDTH)
        bounded("n_layers", self.n_layers, MAX_LAYERS)
        bounded("n_heads times head_dim", self.n_heads * self.head_dim, MAX_WIDTH)
        if self.n_heads % self.n_kv_heads:
            raise MinisaError(
                f"n_heads {self.n_heads} is not a multiple of n_kv_heads {self.n_kv_heads}: "
                "each key head must serve the same number of query heads"
            )
        if self.head_dim % 2:
            raise MinisaError(f"head_dim {self.head_dim} is odd: RoPE turns pairs of dimensions")
        within("norm_eps", self.norm_eps, NORM_EPSILONS)
        within("rope_theta", self.rope_theta, ROPE_THETAS)
        if self.sliding_window is not None:
            bounded("sliding_window", self.sliding_window, MAX_WIDTH)

    @property
    def attention_factor(self) -> float:
        """What the cosines and sines of RoPE are multiplied by."""
        return 1.0 if self.rope_scaling is None else self.rope_scaling.attention_factor

    @property
    def longest_seq_len(self) -> int:
        """The highest max_seq_len to run with: beside a linear scaling, some publishers state the context before it."""
        if self.rope_scaling is None or self.rope_scaling.kind != "linear":
            return self.max_seq_len
        return max(self.max_seq_len, min(int(self.max_seq_len * self.rope_scaling.factor), MAX_WIDTH))

    @property
    def group_size(self) -> int:
        """Query heads for each key and value head (1 is plain multi-head attention)."""
        return self.n_heads // self.n_kv_heads


def bounded(key: str, value: int, limit: int) -> None:
    if not 0 < value <= limit:
        raise MinisaError(f"{key} is {value}: expected 1 to {limit}")


def within(key: str, number: float, bounds: tuple[float, float]) -> None:
    least, most = bounds
    if not least <= number <= most:
        raise MinisaError(f"{key} is {number!r}: expected {least:g} to {most:g}")
