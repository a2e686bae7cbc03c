"""A model's description, in config.json, params.json or a GGUF file's metadata, as a ModelConfig.

Nothing is guessed from a file name, and an option that is not understood is refused by name: a wrong RoPE
base or an ignored bias does not crash, it talks gibberish. A value of null is one that is not there.
All raise MinisaError, which names the key and what was expected.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from minisa.config import MAX_WIDTH, ROPE_FACTORS, ModelConfig, RopeScaling, within
from minisa.errors import MinisaError

Raw = Mapping[str, Any]
# The model_type of each; the third is how the first conversions of Llama 1 spelled it.
ARCHITECTURES = {"LlamaForCausalLM": "llama", "MistralForCausalLM": "mistral", "LLaMAForCausalLM": "llama"}


def config_from_hf(raw: Raw) -> ModelConfig:
    """From a Hugging Face config.json of LlamaForCausalLM or MistralForCausalLM."""
    architectures = raw.get("architectures") or []
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        raise MinisaError(f"config.json: architectures is {architectures!r}: expected a list of names")
    known = [ARCHITECTURES[name] for name in architectures if name in ARCHITECTURES]
    if architectures and not known:
        raise MinisaError(
            f"config.json: architecture {', '.join(architectures)} is not supported: "
            "expected LlamaForCausalLM or MistralForCausalLM"
        )
    model_type = raw.get("model_type") or next(iter(known), None)
    if model_type not in ("llama", "mistral"):  # transformers goes by it, whatever the architecture says
        raise MinisaError(f"config.json: model_type {model_type!r} is not supported: expected 'llama' or 'mistral'")
    for key in ("attention_bias", "mlp_bias"):
        if flag(raw, key):
            raise MinisaError(f"config.json: {key} is true; minisa's layers have no biases")
    require_causal(raw, "is_causal")
    if raw.get("hidden_act", "silu") != "silu":
        raise MinisaError(f"config.json: hidden_act {raw['hidden_act']!r} is not supported: expected 'silu'")
    if raw.get("quantization_config"):
        raise MinisaError(
            "config.json: quantization_config is set: expected fp32, fp16 or bf16 weights, or a GGUF file"
        )
    kinds = raw.get("layer_types") or ["sliding_attention" if model_type == "mistral" else "full_attention"]
    if not isinstance(kinds, list) or any(kind != kinds[0] for kind in kinds):
        raise MinisaError("config.json: layer_types names several kinds of layers: expected one kind for all")
    if kinds[0] != "full_attention" and (model_type, kinds[0]) != ("mistral", "sliding_attention"):
        raise MinisaError(f"config.json: layer_types {kinds[0]!r} is not supported: expected 'full_attention'")
    if raw.get("per_layer_config"):
        raise MinisaError("config.json: per_layer_config is set: expected layers that are all alike")
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}  # transformers 5 writes the latter
    if not isinstance(rope, Mapping):
        raise MinisaError(f"config.json: rope_scaling is {rope!r}: expected an object")
    if any(isinstance(value, Mapping) for value in rope.values()):
        raise MinisaError("config.json: rope_parameters differ by kind of layer: expected one kind for all")
    original = "original_max_position_embeddings"
    originals = {optional_integer(part, original) for part in (raw, rope)} - {None}
    if len(originals) > 1:  # transformers 5 goes by the first
        raise MinisaError(f"config.json: {original} is not what rope_scaling says: expected one of the two")
    if any(number(part, "partial_rotary_factor", 1.0) != 1 for part in (raw, rope)):
        raise MinisaError("config.json: partial_rotary_factor is set; minisa turns whole heads")
    n_heads = integer(raw, "num_attention_heads")
    dim = integer(raw, "hidden_size")
    max_seq_len = integer(raw, "max_position_embeddings", 2048 if model_type == "llama" else 131_072)
    scaling = read_rope_scaling({**rope, original: next(iter(originals), None)}, max_seq_len)
    window = None  # LlamaForCausalLM has none
    if kinds[0] == "sliding_attention":
        window = optional_integer(raw, "sliding_window") if "sliding_window" in raw else 4096
    return ModelConfig(
        dim=dim,
        n_layers=integer(raw, "num_hidden_layers"),
        n_heads=n_heads,
        n_kv_heads=integer(raw, "num_key_value_heads", n_heads),
        head_dim=integer(raw, "head_dim", dim // n_heads),
        hidden_dim=integer(raw, "intermediate_size"),
        vocab_size=integer(raw, "vocab_size"),
        max_seq_len=_context(max_seq_len, scaling),
        norm_eps=number(raw, "rms_norm_eps", 1e-6),
        rope_theta=number(rope, "rope_theta", number(raw, "rope_theta", 10_000.0)),
        rope_scaling=scaling,
        tie_embeddings=flag(raw, "tie_word_embeddings"),
        sliding_window=window,
    )


def config_from_params(raw: Raw, vocab_size: int) -> ModelConfig:
    """From the params.json of Meta's or Mistral's own downloads.

    vocab_size: rows of the embedding matrix; Meta's Llama 2 files say -1 and leave it to the tokenizer.
    Meta's files do not say the context length either: 131,072 where `use_scaled_rope` is set (Llama 3.1
    and later), 2,048 where norm_eps or the shape is one of Llama 1's, else what the RoPE base was made for.
    Nor do they say the factor of Llama 3.2's 1B and 3B, which is 32 in what Meta publishes at Hugging Face.
    """
    if raw.get("moe") or raw.get("num_experts"):
        raise MinisaError("params.json: mixture-of-experts models are not supported: expected a dense Llama or Mistral")
    for key, value in raw.items():  # YaRN, a window for each layer, quantization, an encoder
        if value and (isinstance(value, Mapping | list) or key == "_sliding_window"):
            raise MinisaError(f"params.json: {key} is not supported: expected a dense Llama or Mistral without it")
    require_causal(raw, "causal")
    dim, n_heads = integer(raw, "dim"), integer(raw, "n_heads")
    window = optional_integer(raw, "sliding_window")
    if "hidden_dim" in raw:  # Mistral; without a window its default base is a million
        hidden_dim = integer(raw, "hidden_dim")
        rope_theta = number(raw, "rope_theta", 10_000.0 if window else 1_000_000.0)
    else:  # Meta: two thirds of four times the width, rounded up
        hidden_dim = int(int(8 * dim / 3) * number(raw, "ffn_dim_multiplier", 1.0))
        multiple = integer(raw, "multiple_of", 256)
        hidden_dim = multiple * -(-hidden_dim // multiple)
        rope_theta = number(raw, "rope_theta", 10_000.0)
    scaled = flag(raw, "use_scaled_rope")
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
        n_layers=integer(raw, "n_layers"),
        n_heads=n_heads,
        n_kv_heads=integer(raw, "n_kv_heads", n_heads),
        head_dim=integer(raw, "head_dim", dim // n_heads),
        hidden_dim=hidden_dim,
        vocab_size=vocab_size,
        max_seq_len=integer(raw, "max_seq_len", context),
        norm_eps=number(raw, "norm_eps", 1e-5),
        rope_theta=rope_theta,
        rope_scaling=RopeScaling("llama3", number(raw, "rope_scaling_factor", factor)) if scaled else None,
        tie_embeddings=flag(raw, "tied_embeddings"),
        sliding_window=window,
    )


def config_from_gguf(metadata: Raw, *, tied: bool, rope_factors: tuple[float, ...] | None = None) -> ModelConfig:
    """From the metadata of a GGUF file of architecture "llama".

    tied: the file has no output.weight. rope_factors: its rope_freqs.weight (Llama 3.1 and later).
    """
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise MinisaError(f"GGUF: general.architecture {architecture!r} is not supported: expected 'llama'")
    # The "llama." prefix goes, so that the keys read alike everywhere.
    raw = {key.removeprefix("llama."): value for key, value in metadata.items() if key.startswith("llama.")}
    if raw.get("expert_count"):
        raise MinisaError("GGUF: llama.expert_count is set; mixture-of-experts models are not supported")
    require_causal(raw, "attention.causal")
    n_heads, dim = integer(raw, "attention.head_count"), integer(raw, "embedding_length")
    head_dim = integer(raw, "attention.key_length", dim // n_heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if integer(raw, key, head_dim) != head_dim:
            raise MinisaError(f"GGUF: llama.{key} is {raw[key]}, head_dim is {head_dim}: they must be the same")
    tokens = metadata.get("tokenizer.ggml.tokens")
    max_seq_len = integer(raw, "context_length", 4096)
    # As in llama.cpp: linear unless it says otherwise, 0 for none, and the factor's old name.
    factor = number(raw, "rope.scaling.factor", number(raw, "rope.scale_linear", 0.0)) or 1.0
    for key in ("rope.scaling.attn_factor", "rope.scaling.yarn_attn_factor", "rope.scaling.yarn_ext_factor"):
        if raw.get(key, 1) != 1:  # llama.cpp obeys, whatever the type
            raise MinisaError(f"GGUF: llama.{key} is {raw[key]!r}: expected 1, or none")
    described = {
        "type": raw.get("rope.scaling.type", "linear"),
        "factor": factor,
        "original_max_position_embeddings": raw.get("rope.scaling.original_context_length"),
        "beta_fast": raw.get("rope.scaling.yarn_beta_fast"),
        "beta_slow": raw.get("rope.scaling.yarn_beta_slow"),
    }
    scaling = read_rope_scaling(described, max_seq_len)
    if scaling == RopeScaling("linear"):
        scaling = None
    if rope_factors and scaling:
        raise MinisaError("GGUF: both rope_freqs.weight and a llama.rope.scaling.factor: expected one")
    if rope_factors:
        scaling = RopeScaling("factors", factors=rope_factors)
    return ModelConfig(
        dim=dim,
        n_layers=integer(raw, "block_count"),
        n_heads=n_heads,
        n_kv_heads=integer(raw, "attention.head_count_kv", n_heads),
        head_dim=head_dim,
        hidden_dim=integer(raw, "feed_forward_length"),
        vocab_size=integer(raw, "vocab_size", len(tokens) if tokens else None),
        max_seq_len=_context(max_seq_len, scaling),
        norm_eps=number(raw, "attention.layer_norm_rms_epsilon"),
        rope_theta=number(raw, "rope.freq_base", 10_000.0),
        rope_scaling=scaling,
        tie_embeddings=tied,
        sliding_window=optional_integer(raw, "attention.sliding_window"),
    )


def _context(stated: int, scaling: RopeScaling | None) -> int:
    """The context in tokens; where YaRN is described beside the one before it, what that makes of it."""
    if scaling is None or scaling.kind != "yarn":
        return stated
    return max(stated, min(int(scaling.factor * scaling.original_max_seq_len), MAX_WIDTH))


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


def flag(raw: Raw, key: str) -> bool:
    value = raw.get(key)
    if value is None:
        return False
    if not isinstance(value, bool):
        raise MinisaError(f"{key} is {value!r}: expected true or false")
    return value


def require_causal(raw: Raw, key: str) -> None:
    if key in raw and not flag(raw, key):  # transformers takes null for no as well
        value = "null" if raw[key] is None else "false"
        raise MinisaError(f"{key} is {value}: expected a model that looks back only, not one that makes embeddings")


def integer(raw: Raw, key: str, default: int | None = None) -> int:
    value = raw.get(key)
    if value is None:
        value = default
    if value is None:
        raise MinisaError(f"the model's description lacks {key!r}: is the file whole?")
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 1 << 63:
        raise MinisaError(f"{key} is {value!r}: expected a whole number, 1 or more, of 64 bits")
    return value


def optional_integer(raw: Raw, key: str) -> int | None:
    return None if raw.get(key) is None else integer(raw, key)


def number(raw: Raw, key: str, default: float | None = None) -> float:
    value = raw.get(key)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300:
        raise MinisaError(f"{key} is {value!r}: expected a finite number")
    return float(value)
