"""ModelConfig: the shape of a Llama-architecture model, read from the checkpoint's own description.

Nothing is guessed from a file name, and an option that is not understood is refused by name: a wrong RoPE
base or an ignored bias does not crash, it talks gibberish.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from minisa.descriptions import Raw, bounded, flag, integer, number, optional_integer, require_causal, within
from minisa.errors import MinisaError
from minisa.rope_scaling import RopeScaling, read_rope_scaling

MAX_LAYERS = 1024  # sanity bounds for headers that lie; the largest Llama has 126 layers, and each takes a millisecond
MAX_WIDTH = 1 << 24
ROPE_THETAS = (1.0, 1e12)
NORM_EPSILONS = (1e-12, 1.0)
# The model_type of each; the third is how the first conversions of Llama 1 spelled it.
ARCHITECTURES = {"LlamaForCausalLM": "llama", "MistralForCausalLM": "mistral", "LLaMAForCausalLM": "llama"}


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
        if self.rope_scaling is not None and self.rope_scaling.kind == "yarn":
            self.rope_scaling.yarn_ramp(self.rope_theta, self.head_dim)

    @property
    def attention_factor(self) -> float:
        """By what cosines and sines of RoPE are multiplied."""
        return 1.0 if self.rope_scaling is None else self.rope_scaling.attention_factor

    @property
    def longest_seq_len(self) -> int:
        """How far max_seq_len may be raised. Beside a linear scaling some publishers state the context before it."""
        if self.rope_scaling is None or self.rope_scaling.kind != "linear":
            return self.max_seq_len
        return max(self.max_seq_len, min(int(self.max_seq_len * self.rope_scaling.factor), MAX_WIDTH))

    @property
    def group_size(self) -> int:
        """Query heads for each key and value head (1 is plain multi-head attention)."""
        return self.n_heads // self.n_kv_heads

    @classmethod
    def from_hf(cls, raw: Raw) -> ModelConfig:
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
        return cls(
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

    @classmethod
    def from_params(cls, raw: Raw, vocab_size: int) -> ModelConfig:
        """From the params.json of Meta's or Mistral's own downloads.

        vocab_size: rows of the embedding matrix; Meta's Llama 2 files say -1 and leave it to the tokenizer.
        Meta's files do not say the context length either: 131,072 where `use_scaled_rope` is set (Llama 3.1
        and later), 2,048 where norm_eps or the shape is one of Llama 1's, else what the RoPE base was made for.
        Nor do they say the factor of Llama 3.2's 1B and 3B, which is 32 in what Meta publishes at Hugging Face.
        """
        if raw.get("moe") or raw.get("num_experts"):
            raise MinisaError(
                "params.json: mixture-of-experts models are not supported: expected a dense Llama or Mistral"
            )
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
        return cls(
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

    @classmethod
    def from_gguf(cls, metadata: Raw, *, tied: bool, rope_factors: tuple[float, ...] | None = None) -> ModelConfig:
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
        return cls(
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
