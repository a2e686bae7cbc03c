"""The families minisa is for, as their makers published them: the shape in config.json, and how many parameters it has.

Each is also made small, with everything that sets it apart kept: heads for each key head, a head_dim of its own, ties,
windows and rotary bases.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from minisa.checkpoint.description import config_from_hf
from minisa.config import ModelConfig


@dataclass(frozen=True)
class Family:
    """description: of config.json, all that shapes the model; the context where a test compares it. parameters: as
    published."""

    description: dict[str, Any]
    parameters: int

    @property
    def config(self) -> ModelConfig:
        return config_from_hf(self.description)

    def in_miniature(self) -> ModelConfig:
        """Two key heads of 32, two layers; context, window and original context to fit 100 tokens."""
        full = self.config
        n_heads, head_dim = 2 * full.group_size, 32
        scaling = full.rope_scaling and replace(full.rope_scaling, original_max_seq_len=64)
        return replace(
            full,
            dim=n_heads * head_dim * full.dim // (full.n_heads * full.head_dim),
            n_layers=2,
            n_heads=n_heads,
            n_kv_heads=2,
            head_dim=head_dim,
            hidden_dim=96,
            vocab_size=256,
            max_seq_len=256,
            rope_scaling=scaling,
            sliding_window=full.sliding_window and 24,
        )


def _family(
    dim: int, n_layers: int, heads: tuple[int, int], hidden_dim: int, vocab_size: int, parameters: int, **more: Any
) -> Family:
    description = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_act": "silu",
        "hidden_size": dim,
        "intermediate_size": hidden_dim,
        "num_attention_heads": heads[0],
        "num_hidden_layers": n_layers,
        "num_key_value_heads": heads[1],
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "vocab_size": vocab_size,
    }
    return Family(description | more, parameters)


def _mistral(*shape: Any, **more: Any) -> Family:
    return _family(*shape, **{"architectures": ["MistralForCausalLM"], "sliding_window": None} | more)


def _llama31(factor: float) -> dict[str, Any]:
    scaling = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 8192
    return {"rope_theta": 5e5, "rope_scaling": scaling, "max_position_embeddings": 131_072}


_YARN = {"type": "yarn", "factor": 16.0, "original_max_position_embeddings": 4096, "finetuned": True}
_LLAMA3 = {"rope_theta": 5e5, "max_position_embeddings": 8192}
_CODE = {"rope_theta": 1e6, "max_position_embeddings": 16_384}
_TIED = {"tie_word_embeddings": True}

FAMILIES: dict[str, Family] = {
    "llama-7b": _family(
        4096, 32, (32, 32), 11_008, 32_000, 6_738_415_616, rms_norm_eps=1e-6, max_position_embeddings=2048
    ),
    "llama-65b": _family(8192, 80, (64, 64), 22_016, 32_000, 65_285_660_672, max_position_embeddings=2048),
    "llama2-13b": _family(5120, 40, (40, 40), 13_824, 32_000, 13_015_864_320),
    "llama2-70b": _family(8192, 80, (64, 8), 28_672, 32_000, 68_976_648_192),
    "yarn-llama2-7b-64k": _family(4096, 32, (32, 32), 11_008, 32_000, 6_738_415_616, rope_scaling=_YARN),
    "code-llama-7b": _family(4096, 32, (32, 32), 11_008, 32_016, 6_738_546_688, **_CODE),
    "code-llama-34b": _family(8192, 48, (64, 8), 22_016, 32_000, 33_743_970_304, **_CODE),
    "tinyllama-1.1b": _family(2048, 22, (32, 4), 5632, 32_000, 1_100_048_384, max_position_embeddings=2048),
    "llama3-8b": _family(4096, 32, (32, 8), 14_336, 128_256, 8_030_261_248, **_LLAMA3),
    "llama3.1-405b": _family(16_384, 126, (128, 8), 53_248, 128_256, 405_853_388_800, **_llama31(8.0)),
    "llama3.2-1b": _family(2048, 16, (32, 8), 8192, 128_256, 1_235_814_400, **_TIED, **_llama31(32.0)),
    "llama3.2-3b": _family(3072, 28, (24, 8), 8192, 128_256, 3_212_749_824, **_TIED, **_llama31(32.0)),
    "llama3.3-70b": _family(8192, 80, (64, 8), 28_672, 128_256, 70_553_706_496, **_llama31(8.0)),
    "smollm2-135m": _family(576, 30, (9, 3), 1536, 49_152, 134_515_008, rope_theta=1e5, **_TIED),
    "smollm2-1.7b": _family(2048, 24, (32, 32), 8192, 49_152, 1_711_376_384, rope_theta=1.3e5, **_TIED),
    "yi-6b": _family(4096, 32, (32, 4), 11_008, 64_000, 6_061_035_520, rope_theta=5e6),
    "yi-34b": _family(7168, 60, (56, 8), 20_480, 64_000, 34_388_917_248, rope_theta=5e6),
    "mistral-7b-v0.1": _mistral(4096, 32, (32, 8), 14_336, 32_000, 7_241_732_096, sliding_window=4096),
    "mistral-7b-v0.3": _mistral(4096, 32, (32, 8), 14_336, 32_768, 7_248_023_552, rope_theta=1e6),
    "mistral-nemo": _mistral(5120, 40, (32, 8), 14_336, 131_072, 12_247_782_400, head_dim=128, rope_theta=1e6),
    "mistral-small-24b": _mistral(5120, 40, (32, 8), 32_768, 131_072, 23_572_403_200, head_dim=128, rope_theta=1e8),
    "mistral-large": _mistral(12_288, 88, (96, 8), 28_672, 32_768, 122_610_069_504, rope_theta=1e6),
    "codestral-22b": _mistral(6144, 56, (48, 8), 16_384, 32_768, 22_247_282_688, rope_theta=1e6),
}
