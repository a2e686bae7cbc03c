"""Shapes by name, for random weights and for arithmetic; a checkpoint always brings its own."""

from __future__ import annotations

from typing import Any

from minisa.config import ModelConfig, RopeScaling


def _llama(
    dim: int, n_layers: int, n_heads: int, n_kv_heads: int, hidden_dim: int, vocab: int, **rest: Any
) -> ModelConfig:
    head_dim = rest.pop("head_dim", dim // n_heads)
    return ModelConfig(dim, n_layers, n_heads, n_kv_heads, head_dim, hidden_dim, vocab, **rest)


def _llama31(factor: float) -> dict[str, Any]:
    return {"max_seq_len": 131_072, "rope_theta": 500_000.0, "rope_scaling": RopeScaling("llama3", factor)}


PRESETS: dict[str, ModelConfig] = {
    "smollm2-135m": _llama(576, 30, 9, 3, 1536, 49_152, max_seq_len=8192, rope_theta=1e5, tie_embeddings=True),
    "smollm2-360m": _llama(960, 32, 15, 5, 2560, 49_152, max_seq_len=8192, rope_theta=1e5, tie_embeddings=True),
    "smollm2-1.7b": _llama(2048, 24, 32, 32, 8192, 49_152, max_seq_len=8192, rope_theta=130_000.0, tie_embeddings=True),
    "tinyllama-1.1b": _llama(2048, 22, 32, 4, 5632, 32_000, max_seq_len=2048),
    "llama2-7b": _llama(4096, 32, 32, 32, 11_008, 32_000, max_seq_len=4096),
    "llama3-8b": _llama(4096, 32, 32, 8, 14_336, 128_256, max_seq_len=8192, rope_theta=500_000.0),
    "llama3.1-8b": _llama(4096, 32, 32, 8, 14_336, 128_256, **_llama31(8.0)),
    "llama3.2-1b": _llama(2048, 16, 32, 8, 8192, 128_256, tie_embeddings=True, **_llama31(32.0)),
    "llama3.2-3b": _llama(3072, 28, 24, 8, 8192, 128_256, tie_embeddings=True, **_llama31(32.0)),
    "mistral-7b-v0.1": _llama(4096, 32, 32, 8, 14_336, 32_000, max_seq_len=32_768, sliding_window=4096),
    "mistral-7b-v0.2": _llama(4096, 32, 32, 8, 14_336, 32_000, max_seq_len=32_768, rope_theta=1e6),
    "mistral-7b-v0.3": _llama(4096, 32, 32, 8, 14_336, 32_768, max_seq_len=32_768, rope_theta=1e6),
}

# What bench.py measures and compares with. They stand here so that its --help need not import PyTorch.
CONTEXTS = (0, 512, 1500, 4096)
PROMPT_LENGTHS = (128, 512, 2048)
PEERS = {"transformers": ("transformers",), "llama.cpp": ("xllamacpp", "gguf")}  # and the packages each needs
