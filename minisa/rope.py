"""Rotary position embeddings in the half-split order: dimension i turns with dimension i + head_dim/2.

Source: Su et al., arXiv 2104.09864; the Llama 3.1 rule is that of Meta's reference code, YaRN is arXiv 2309.00071.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from minisa.config import ModelConfig, RopeScaling
from minisa.errors import MinisaError


def rope_frequencies(config: ModelConfig) -> Tensor:
    """Radians a position for each pair of dimensions: [head_dim / 2], fp32, on the CPU.

    In fp32 throughout, as the models were trained. Raises MinisaError where a GGUF file's own factors do not fit the
    heads, or YaRN's numbers leave no pairs between its two rules.
    """
    even = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu")
    frequencies = 1.0 / config.rope_theta ** (even / config.head_dim)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    if scaling.kind == "factors":
        if len(scaling.factors) != len(frequencies):
            raise MinisaError(
                f"rope_freqs.weight has {len(scaling.factors)} factors: expected head_dim / 2 = {len(frequencies)}"
            )
        return frequencies / torch.tensor(scaling.factors, dtype=torch.float32, device="cpu")
    if scaling.kind == "yarn":
        return _yarn(frequencies, scaling, config)
    return _llama3(frequencies, scaling)


def _llama3(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Long wavelengths stretched by the factor, short ones kept, a straight line between (Llama 3.1)."""
    wavelengths = 2 * math.pi / frequencies
    turns = scaling.original_max_seq_len / wavelengths  # full turns over the original context
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)  # 1 keeps the frequency, 0 divides it
    return kept * frequencies + (1 - kept) * frequencies / scaling.factor


def _yarn(frequencies: Tensor, scaling: RopeScaling, config: ModelConfig) -> Tensor:
    """Slow pairs stretched by the factor, fast ones kept, a straight line over the pairs between."""

    def pair(turns: float) -> float:  # the one that makes so many turns over the original context
        inverse = scaling.original_max_seq_len / (2 * math.pi * turns)  # of its frequency
        return config.head_dim * math.log(inverse) / (2 * math.log(max(config.rope_theta, 1.001)))

    first = max(math.floor(pair(scaling.beta_fast)), 0)
    last = min(math.ceil(pair(scaling.beta_slow)), config.head_dim - 1)
    if first >= last:
        raise MinisaError(
            f"rope_scaling: yarn from rotary pair {first} to {last}: expected an original context, a rope_theta and "
            "betas that leave some between them"
        )
    divided = ((torch.arange(len(frequencies), device="cpu") - first) / (last - first)).clamp(0, 1)
    return (1 - divided) * frequencies + divided * frequencies / scaling.factor


def rope_angles(frequencies: Tensor, positions: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """cos and sin of every position's angles: each [B, 1, T, head_dim / 2], fp32, for positions [B, T].

    factor: the config's attention_factor, by which both are multiplied.
    """
    if frequencies.dtype != torch.float32:
        raise TypeError("rope_frequencies must stay fp32: cast the weights, not the whole model")
    angles = positions[:, None, :, None].float() * frequencies  # [B, 1, T, D/2]
    return angles.cos() * factor, angles.sin() * factor


def apply_rope(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Turn x [B, H, T, D] by the angles of its positions, in fp32; x's dtype comes back."""
    cos, sin = angles
    first, second = x.float().chunk(2, dim=-1)  # [B, H, T, D/2] each
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).type_as(x)
