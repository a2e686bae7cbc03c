"""A model's description, in config.json, params.json or a GGUF file's metadata, as a ModelConfig.

Nothing is guessed from a file name, and an option that is not understood is refused by name: a wrong RoPE
base or an ignored bias does not crash, it talks gibberish. A value of null is one that is not there.
All raise MinisaError, which names the key and what was expected.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeVar

from minisa.config import MAX_WIDTH, ROPE_FACTORS, ModelConfig, RopeScaling, within
from minisa.errors import MinisaError

Raw = Mapping[str, Any]
T = TypeVar("T", int, float, bool)
D = TypeVar("D")
# The model_type of each; the third is how the first conversions of Llama 1 spelled it.
ARCHITECTURES = {"LlamaForCausalLM": "llama", "MistralForCausalLM": "mistral", "LLaMAForCausalLM": "llama"}
_ORIGINAL = "original_max_position_embeddings"


def config_from_hf(raw: Raw) -> ModelConfig:
    """From a Hugging Face config.json of LlamaForCausalLM or MistralForCausalLM."""
    architectures = raw.get("architectures") or []
    known = next((model_type for name, model_type in ARCHITECTURES.items() if name in architectures), None)
    if architectures and not known:
        raise MinisaError(
            f"architectures {architectures} are not supported: expected LlamaForCausalLM or MistralForCausalLM"
        )
    model_type = raw.get("model_type") or known
    if model_type not in ("llama", "mistral"):  # transformers goes by it, whatever the architecture says
        raise MinisaError(f"model_type {model_type!r} is not supported: expected 'llama' or 'mistral'")
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}  # transformers 5 writes the latter
    if not isinstance(rope, Mapping) or any(isinstance(value, Mapping) for value in rope.values()):
        raise MinisaError(f"rope_scaling is {rope!r}: expected one object for all layers")
    if raw.get("quantization_config"):
        raise MinisaError("quantization_config is set: expected fp32, fp16 or bf16 weights, or a GGUF file")
    refuse(raw, {"attention_bias": (None, False), "mlp_bias": (None, False), "per_layer_config": ({}, None)})
    refuse(raw, {"is_causal": (True,), "hidden_act": ("silu",)})
    for part in (raw, rope):
        refuse(part, {"partial_rotary_factor": (None, 1), "truncate": (None, True)})
    kinds = raw.get("layer_types") or ["sliding_attention" if model_type == "mistral" else "full_attention"]
    supported = (["full_attention"], ["sliding_attention"] if model_type == "mistral" else [])
    if not isinstance(kinds, list) or [kind for kind in kinds if kind != kinds[0]] or kinds[:1] not in supported:
        raise MinisaError(f"layer_types {kinds} are not supported: expected one kind for all, 'full_attention'")
    originals = {read(part, _ORIGINAL, int, None) for part in (raw, rope)} - {None}
    if len(originals) > 1:  # transformers 5 goes by the first
        raise MinisaError(f"{_ORIGINAL} is not what rope_scaling says: expected one of the two")
    n_heads, dim = read(raw, "num_attention_heads", int), read(raw, "hidden_size", int)
    max_seq_len = read(raw, "max_position_embeddings", int, 2048 if model_type == "llama" else 131_072)
    scaling = read_rope_scaling({**rope, _ORIGINAL: next(iter(originals), None)}, max_seq_len)
    window = None  # LlamaForCausalLM has none
    if kinds[0] == "sliding_attention":
        window = read(raw, "sliding_window", int, None) if "sliding_window" in raw else 4096
    return ModelConfig(
        dim=dim,
        n_layers=read(raw, "num_hidden_layers", int),
        n_heads=n_heads,
        n_kv_heads=read(raw, "num_key_value_heads", int, n_heads),
        head_dim=read(raw, "head_dim", int, dim // n_heads),
        hidden_dim=read(raw, "intermediate_size", int),
        vocab_size=read(raw, "vocab_size", int),
        max_seq_len=_context(max_seq_len, scaling),
        norm_eps=read(raw, "rms_norm_eps", float, 1e-6),
        rope_theta=read(rope, "rope_theta", float, read(raw, "rope_theta", float, 10_000.0)),
        rope_scaling=scaling,
        tie_embeddings=read(raw, "tie_word_embeddings", bool, False),
        sliding_window=window,
    )


def config_from_params(raw: Raw, vocab_size: int) -> ModelConfig:
    """From the params.json of Meta's or Mistral's own downloads.

    vocab_size: rows of the embedding matrix; Meta's Llama 2 files say -1 and leave it to the tokenizer.
    Meta's files do not say the context length either: 131,072 where `use_scaled_rope` is set (Llama 3.1
    and later), 2,048 where norm_eps or the shape is one of Llama 1's, else what the RoPE base was made for.
    Nor do they say the factor of Llama 3.2's 1B and 3B, which is 32 in what Meta publishes at Hugging Face.
    """
    for key, value in raw.items():  # experts, YaRN, a window for each layer, quantization, an encoder
        if value and (isinstance(value, Mapping | list) or key in ("_sliding_window", "num_experts")):
            raise MinisaError(f"{key} is not supported: expected a dense Llama or Mistral without it")
    refuse(raw, {"causal": (True,)})
    dim, n_heads = read(raw, "dim", int), read(raw, "n_heads", int)
    window = read(raw, "sliding_window", int, None)
    if "hidden_dim" in raw:  # Mistral; without a window its default base is a million
        hidden_dim = read(raw, "hidden_dim", int)
        rope_theta = read(raw, "rope_theta", float, 10_000.0 if window else 1_000_000.0)
    else:  # Meta: two thirds of four times the width, rounded up
        hidden_dim = int(int(8 * dim / 3) * read(raw, "ffn_dim_multiplier", float, 1.0))
        multiple = read(raw, "multiple_of", int, 256)
        hidden_dim = multiple * -(-hidden_dim // multiple)
        rope_theta = read(raw, "rope_theta", float, 10_000.0)
    scaled = read(raw, "use_scaled_rope", bool, False)
    factor = 8.0 if dim >= 4096 else 32.0  # Llama 3.1 and 3.3; Llama 3.2
    if scaled:
        context = 131_072
    elif rope_theta >= 1_000_000:
        context = 32_768 if "hidden_dim" in raw else 16_384  # Mistral v0.2+, Code Llama
        if rope_theta == 1_000_000 and dim in (5120, 12_288):  # Nemo, Large
            context = 131_072
    elif rope_theta >= 500_000:
        context = 8192  # Llama 3
    elif window:
        context = 32_768  # Mistral v0.1
    else:
        llama1 = raw.get("norm_eps") == 1e-6 or (dim >= 8192 and "n_kv_heads" not in raw)  # up to 33B; 65B
        context = 2048 if llama1 else 4096  # Llama 2
    return ModelConfig(
        dim=dim,
        n_layers=read(raw, "n_layers", int),
        n_heads=n_heads,
        n_kv_heads=read(raw, "n_kv_heads", int, n_heads),
        head_dim=read(raw, "head_dim", int, dim // n_heads),
        hidden_dim=hidden_dim,
        vocab_size=vocab_size,
        max_seq_len=read(raw, "max_seq_len", int, context),
        norm_eps=read(raw, "norm_eps", float, 1e-5),
        rope_theta=rope_theta,
        rope_scaling=RopeScaling("llama3", read(raw, "rope_scaling_factor", float, factor)) if scaled else None,
        tie_embeddings=read(raw, "tied_embeddings", bool, False),
        sliding_window=window,
    )


def config_from_gguf(metadata: Raw, *, tied: bool, rope_factors: tuple[float, ...] | None = None) -> ModelConfig:
    """From the metadata of a GGUF file of architecture "llama".

    tied: the file has no output.weight. rope_factors: its rope_freqs.weight (Llama 3.1 and later).
    """
    refuse(metadata, {"general.architecture": ("llama",)}, required=True)
    # The "llama." prefix goes, so that the keys read alike everywhere.
    raw = {key.removeprefix("llama."): value for key, value in metadata.items() if key.startswith("llama.")}
    scalings = ("attn_factor", "yarn_attn_factor", "yarn_ext_factor")
    refuse(raw, {f"rope.scaling.{key}": (1,) for key in scalings})  # llama.cpp obeys, whatever the type
    refuse(raw, {"expert_count": (None, 0), "attention.causal": (True,)})
    n_heads, dim = read(raw, "attention.head_count", int), read(raw, "embedding_length", int)
    head_dim = read(raw, "attention.key_length", int, dim // n_heads)
    refuse(raw, {"attention.value_length": (head_dim,), "rope.dimension_count": (head_dim,)})
    tokens = metadata.get("tokenizer.ggml.tokens")
    max_seq_len = read(raw, "context_length", int, 4096)
    # As in llama.cpp: linear unless it says otherwise, 0 for none, and the factor's old name.
    factor = read(raw, "rope.scaling.factor", float, read(raw, "rope.scale_linear", float, 0.0)) or 1.0
    described = {
        "type": raw.get("rope.scaling.type", "linear"),
        "factor": factor,
        _ORIGINAL: raw.get("rope.scaling.original_context_length"),
        "beta_fast": raw.get("rope.scaling.yarn_beta_fast"),
        "beta_slow": raw.get("rope.scaling.yarn_beta_slow"),
    }
    scaling = read_rope_scaling(described, max_seq_len)
    if scaling == RopeScaling("linear"):
        scaling = None
    if rope_factors and scaling:
        raise MinisaError("both rope_freqs.weight and a llama.rope.scaling.factor: expected one")
    if rope_factors:
        scaling = RopeScaling("factors", factors=rope_factors)
    return ModelConfig(
        dim=dim,
        n_layers=read(raw, "block_count", int),
        n_heads=n_heads,
        n_kv_heads=read(raw, "attention.head_count_kv", int, n_heads),
        head_dim=head_dim,
        hidden_dim=read(raw, "feed_forward_length", int),
        vocab_size=read(raw, "vocab_size", int, *([len(tokens)] if tokens else [])),
        max_seq_len=_context(max_seq_len, scaling),
        norm_eps=read(raw, "attention.layer_norm_rms_epsilon", float),
        rope_theta=read(raw, "rope.freq_base", float, 10_000.0),
        rope_scaling=scaling,
        tie_embeddings=tied,
        sliding_window=read(raw, "attention.sliding_window", int, None),
    )


def _context(stated: int, scaling: RopeScaling | None) -> int:
    """The context in tokens; where YaRN is described beside the one before it, what that makes of it."""
    if scaling is None or scaling.kind != "yarn":
        return stated
    return max(stated, min(int(scaling.factor * scaling.original_max_seq_len), MAX_WIDTH))


def read_rope_scaling(raw: Raw, max_seq_len: int) -> RopeScaling | None:
    """What config.json calls rope_scaling or rope_parameters; None where it asks for nothing.

    max_seq_len: the model's context. "dynamic" concerns what lies beyond it, where minisa never goes.
    """
    kind = raw.get("rope_type", raw.get("type", "default"))
    if kind in ("default", "none"):
        return None
    if kind not in ("dynamic", "linear", "llama3", "yarn"):
        raise MinisaError(
            f"rope_scaling type {kind!r} is not supported: expected 'dynamic', 'linear', 'llama3' or 'yarn'"
        )
    original = read(raw, _ORIGINAL, int, max_seq_len)
    if kind == "yarn":
        factor = read(raw, "factor", float, max_seq_len / original)
        return RopeScaling(
            "yarn",
            factor=factor,
            original_max_seq_len=original,
            beta_fast=read(raw, "beta_fast", float, 32.0),
            beta_slow=read(raw, "beta_slow", float, 1.0),
            attention_factor=read(raw, "attention_factor", float, _yarn_attention(raw, factor)),
        )
    factor = read(raw, "factor", float)
    if kind == "llama3":
        low, high = read(raw, "low_freq_factor", float), read(raw, "high_freq_factor", float)
        return RopeScaling("llama3", factor, low, high, original)
    within("rope_scaling: factor", factor, ROPE_FACTORS)
    return RopeScaling("linear", factor) if kind == "linear" else None


def _yarn_attention(raw: Raw, factor: float) -> float:
    """What YaRN's authors and DeepSeek's multiply queries and keys by, where a file does not say."""
    growth = 0.1 * math.log(max(factor, 1.0))
    over, under = read(raw, "mscale", float, 0.0), read(raw, "mscale_all_dim", float, 0.0)
    return (1 + over * growth) / (1 + under * growth) if over and under else 1 + growth


def refuse(raw: Raw, understood: Mapping[str, tuple[Any, ...]], *, required: bool = False) -> None:
    """Raises MinisaError for a key whose value is none of those understood; one that is absent may be required."""
    for key, values in understood.items():
        if (key in raw or required) and raw.get(key) not in values:
            raise MinisaError(f"{key} {raw.get(key)!r} is not supported: expected {values[-1]!r}")


def read(raw: Raw, key: str, kind: type[T], *default: D) -> T | D:
    """A whole number from 1 on, a finite number, or true or false; the default, if one is given, for null or no key."""
    value: Any = raw.get(key)
    if value is None and default:
        return default[0]
    fits, wanted = {
        int: (lambda: type(value) is int and 1 <= value < 1 << 63, "a whole number, 1 or more"),
        float: (lambda: type(value) in (int, float) and abs(value) < 1e300, "a finite number"),
        bool: (lambda: type(value) is bool, "true or false"),
    }[kind]
    if not fits():
        raise MinisaError(f"{key} is {'missing' if value is None else repr(value)}: expected {wanted}")
    return kind(value)
