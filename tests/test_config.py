"""ModelConfig from every maker's description; what is not understood is refused by name."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from minisa.benchmark.presets import PRESETS
from minisa.checkpoint.description import config_from_gguf, config_from_hf, config_from_params
from minisa.config import ModelConfig, RopeScaling
from minisa.costs import parameter_count
from minisa.errors import MinisaError
from minisa.rope import rope_frequencies
from minisa.sharing import SharingPlan
from tests.families import FAMILIES

LLAMA31_8B = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "vocab_size": 128256,
}
GGUF = {
    "general.architecture": "llama",
    "llama.block_count": 30,
    "llama.context_length": 8192,
    "llama.embedding_length": 576,
    "llama.feed_forward_length": 1536,
    "llama.attention.head_count": 9,
    "llama.attention.head_count_kv": 3,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 100000.0,
    "llama.vocab_size": 49152,
}


def hf(**changes: Any) -> ModelConfig:
    return config_from_hf({**LLAMA31_8B, **changes})


def test_published_descriptions_give_the_presets() -> None:
    assert hf() == PRESETS["llama3.1-8b"]
    assert config_from_gguf(GGUF, tied=True) == PRESETS["smollm2-135m"]
    meta = {"dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "vocab_size": 128256}
    meta |= {"multiple_of": 1024, "ffn_dim_multiplier": 1.3, "norm_eps": 1e-05, "rope_theta": 500000.0}
    assert config_from_params(meta, 128256) == PRESETS["llama3-8b"]
    assert config_from_params({**meta, "use_scaled_rope": True}, 128256) == PRESETS["llama3.1-8b"]
    llama2 = {"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-05, "vocab_size": -1}
    assert config_from_params(llama2, 32000) == PRESETS["llama2-7b"]
    assert config_from_params({**llama2, "norm_eps": 1e-06}, 32000) == FAMILIES["llama-7b"].config
    llama65b = {"dim": 8192, "multiple_of": 256, "n_heads": 64, "n_layers": 80, "norm_eps": 1e-05, "vocab_size": -1}
    assert config_from_params(llama65b, 32000) == FAMILIES["llama-65b"].config
    code = {"dim": 8192, "n_layers": 48, "n_heads": 64, "n_kv_heads": 8, "ffn_dim_multiplier": 1.0, "rope_theta": 1e6}
    assert config_from_params(code, 32000) == FAMILIES["code-llama-34b"].config
    mistral = {"dim": 4096, "n_layers": 32, "head_dim": 128, "hidden_dim": 14336, "n_heads": 32, "n_kv_heads": 8}
    mistral |= {"norm_eps": 1e-05, "vocab_size": 32000}
    assert config_from_params({**mistral, "sliding_window": 4096}, 32000) == PRESETS["mistral-7b-v0.1"]
    assert config_from_params({**mistral, "rope_theta": 1e6}, 32768) == PRESETS["mistral-7b-v0.3"]
    for dim, context in ((5120, 131_072), (12_288, 131_072), (6144, 32_768)):  # Nemo, Large, Small and Codestral
        assert config_from_params({**mistral, "dim": dim, "rope_theta": 1e6}, 32768).max_seq_len == context


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_has_as_many_parameters_as_published(name: str) -> None:
    family = FAMILIES[name]
    assert parameter_count(family.config, SharingPlan.none(family.config.n_layers)) == family.parameters


LLAMA3_SCALING = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
LINEAR = {"rope_type": "linear", "factor": 2.0}
ORIGINAL = "original_max_position_embeddings"
MISTRAL = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}


def test_transformers_5_spelling() -> None:
    rope = {**LLAMA31_8B["rope_scaling"], "rope_theta": 500000.0}  # type: ignore[dict-item]
    raw = {key: value for key, value in LLAMA31_8B.items() if key not in ("rope_scaling", "rope_theta")}
    assert config_from_hf({**raw, "rope_parameters": rope}) == PRESETS["llama3.1-8b"]
    both = hf(rope_parameters={"rope_type": "default"}, rope_scaling=LINEAR)
    assert both.rope_scaling == RopeScaling("linear", 2.0)  # transformers takes the latter


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"architectures": None}, {}),  # as old and lazy converters wrote them
        ({"architectures": ["LLaMAForCausalLM"]}, {}),
        ({"pretraining_tp": 2}, {}),  # Llama 2: products in slices, of the same weights
        ({"head_dim": None}, {"head_dim": 128}),
        ({"hidden_size": 5120, "head_dim": 128}, {"dim": 5120, "head_dim": 128}),  # Mistral Nemo's
        ({"max_position_embeddings": None, "rope_scaling": None}, {"max_seq_len": 2048, "rope_scaling": None}),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, {"rope_scaling": RopeScaling("linear", 2.0)}),
        # LlamaForCausalLM has no window, whatever a fine-tuner left there; the model_type counts
        ({"sliding_window": 4096}, {}),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 64}, {}),
        ({"model_type": "mistral", "sliding_window": 64}, {"sliding_window": 64}),
        (MISTRAL, {"sliding_window": 4096}),  # what transformers takes where the key is missing
        (MISTRAL | {"sliding_window": None}, {"sliding_window": None}),
        (MISTRAL | {"max_position_embeddings": None}, {"sliding_window": 4096, "max_seq_len": 131_072}),
        # kinds of layers go before the window
        (MISTRAL | {"sliding_window": 64, "layer_types": ["full_attention"] * 32}, {"sliding_window": None}),
        (MISTRAL | {"sliding_window": 64, "layer_types": ["sliding_attention"] * 32}, {"sliding_window": 64}),
        ({"layer_types": ["full_attention"] * 32}, {}),
    ],
)
def test_what_transformers_makes_of_a_key(changes: dict[str, Any], expected: dict[str, Any]) -> None:
    assert hf(**changes) == replace(PRESETS["llama3.1-8b"], **expected)


@pytest.mark.parametrize(
    ("scaling", "stated", "context", "longest"),
    [
        ({"type": "linear", "factor": 4.0}, 4096, 4096, 16_384),  # Vicuna 16k states what was before
        ({"type": "linear", "factor": 0.5}, 4096, 4096, 4096),
        ({"type": "yarn", "factor": 16.0, ORIGINAL: 4096}, 4096, 65_536, 65_536),  # Yarn-Llama-2-7b-64k
        ({"type": "yarn", "factor": 16.0}, 4096, 65_536, 65_536),
        ({"type": "yarn", "factor": 4.0, ORIGINAL: 4096}, 32_768, 32_768, 32_768),
        ({"type": "dynamic", "factor": 4.0}, 4096, 4096, 4096),
    ],
)
def test_the_context_of_a_stretched_model(scaling: dict[str, Any], stated: int, context: int, longest: int) -> None:
    config = hf(rope_scaling=scaling, max_position_embeddings=stated)
    assert (config.max_seq_len, config.longest_seq_len) == (context, longest)
    gguf = {f"llama.rope.scaling.{key}": scaling[key] for key in ("type", "factor") if scaling["type"] != "dynamic"}
    if ORIGINAL in scaling:
        gguf["llama.rope.scaling.original_context_length"] = scaling[ORIGINAL]
    config = config_from_gguf(GGUF | {"llama.context_length": stated} | gguf, tied=True)
    assert (config.max_seq_len, config.longest_seq_len) == (context, longest)


def test_the_original_context_may_stand_outside_the_scaling() -> None:
    for scaling in (LLAMA3_SCALING, YARN | {ORIGINAL: None}):
        found = hf(rope_scaling=scaling, **{ORIGINAL: 2048}).rope_scaling
        assert found is not None
        assert found.original_max_seq_len == 2048


@pytest.mark.parametrize(
    ("changes", "factor", "attention"),
    [
        ({}, 4.0, 1 + 0.1 * math.log(4)),
        ({"factor": None}, 32.0, 1 + 0.1 * math.log(32)),
        ({"factor": 0.5}, 0.5, 1.0),
        ({"attention_factor": 1.5, "mscale": 2.0, "mscale_all_dim": 0.5}, 4.0, 1.5),
        ({"mscale": 2.0, "mscale_all_dim": 0.5}, 4.0, (1 + 0.2 * math.log(4)) / (1 + 0.05 * math.log(4))),
        ({"mscale": 2.0}, 4.0, 1 + 0.1 * math.log(4)),
    ],
)
def test_yarn(changes: dict[str, Any], factor: float, attention: float) -> None:
    """What queries and keys are multiplied by, as transformers has it."""
    scaling = hf(rope_scaling=YARN | {"beta_fast": 16} | changes).rope_scaling
    assert scaling is not None
    assert scaling.attention_factor == pytest.approx(attention)
    assert replace(scaling, attention_factor=1.0) == RopeScaling("yarn", factor, 1.0, 4.0, 4096, (), 16.0)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"architectures": ["Qwen2ForCausalLM"]}, "Qwen2ForCausalLM.* not supported: expected LlamaForCausalLM or Mistral"),
    ({"architectures": None, "model_type": None}, "model_type None is not supported: expected 'llama' or 'mistral'"),
    ({"model_type": "granite"}, "model_type 'granite' is not supported"),
    ({"rope_scaling": {"rope_type": "longrope", "factor": 4.0}}, "rope_scaling type 'longrope' is not supported"),
    ({"rope_scaling": {"rope_type": None, "type": "linear", "factor": 4.0}}, "rope_scaling type None is not supported"),
    ({"rope_scaling": YARN | {"truncate": False}}, "truncate False is not supported: expected True"),
    ({"rope_scaling": YARN | {"attention_factor": 0}}, "rope_scaling: attention_factor is 0.0: expected"),
    ({"rope_scaling": {"type": "dynamic"}}, "factor is missing: expected a finite number"),
    *(({"rope_scaling": LINEAR | {"factor": factor}}, "factor is") for factor in (0, -2.0, math.nan, 1e-40, 1e30)),
    ({"rope_scaling": LLAMA3_SCALING | {"low_freq_factor": 4.0}}, "low_freq_factor is 4.0: expected less than high_fr"),
    ({"rope_scaling": [1]}, r"rope_scaling is \[1\]: expected one object"),
    ({"rope_scaling": {"full_attention": YARN}}, "expected one object for all layers"),
    ({"rope_scaling": LLAMA3_SCALING | {ORIGINAL: 8192}, ORIGINAL: 4096}, f"{ORIGINAL} is not what rope_scaling says"),
    ({"rope_theta": 1e-30}, "rope_theta is 1e-30: expected 1 to 1e\\+12"),
    ({"rms_norm_eps": 10**400}, "rms_norm_eps is 10{99}"),
    ({"rms_norm_eps": 1e200}, "norm_eps is 1e\\+200"),
    ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false': expected true or false"),
    ({"attention_bias": True}, "attention_bias True is not supported: expected False"),
    ({"mlp_bias": True}, "mlp_bias True is not supported"),
    ({"is_causal": None}, "is_causal None is not supported: expected True"),  # null is no to transformers
    ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types .* not supported: expected one kind for"),
    ({"layer_types": ["sliding_attention"], "sliding_window": 64}, "layer_types .*'sliding_attention'.* not supported"),
    ({"layer_types": "full_attention"}, "layer_types full_attention are not supported"),
    ({"per_layer_config": {"1": {"rms_norm_eps": 0.5}}}, "per_layer_config .* is not supported"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported: expected 1"),
    ({"rope_scaling": LINEAR | {"partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5 is not supported"),
    ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported: expected 'silu'"),
    ({"quantization_config": {"bits": 4}}, "quantization_config is set: expected fp32, fp16 or bf16 weights"),
    ({"num_key_value_heads": 5}, "n_heads 32 is not a multiple of n_kv_heads 5"),
    ({"hidden_size": "wide"}, "hidden_size is 'wide': expected a whole number, 1 or more"),
    ({"num_hidden_layers": True}, "num_hidden_layers is True"),
    ({"num_hidden_layers": 10**9}, "n_layers is 1000000000: expected 1 to 1024"),
    ({"num_attention_heads": 0}, "num_attention_heads is 0"),
    ({"vocab_size": None}, "vocab_size is missing"),
    ({"head_dim": 127}, "head_dim 127 is odd"),
    ({"num_attention_heads": 1 << 20, "head_dim": 1 << 20}, "n_heads times head_dim is 1099511627776"),
]


@pytest.mark.parametrize(("changes", "says"), REFUSED)
def test_what_is_not_understood_is_refused_by_name(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(MinisaError, match=says):
        hf(**changes)


def test_yarn_without_pairs_between_its_rules() -> None:
    for changes in ({"rope_scaling": YARN | {"beta_slow": 64}}, {"rope_scaling": YARN, "rope_theta": 1.0}):
        with pytest.raises(MinisaError, match=r"yarn from rotary pair .*: expected an original context"):
            rope_frequencies(hf(**changes))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"use_scaled_rope": "false"}, "use_scaled_rope is 'false': expected true or false"),
        ({"causal": False}, "causal False is not supported"),
        ({"moe": {"num_experts": 8}}, "moe is not supported: expected a dense Llama or Mistral"),
        # Ministral 8B, Devstral 2: all their tensors are a Llama's, and what they do is not
        ({"yarn": {"factor": 16}}, "yarn is not supported"),
        ({"quantization": {"qformat_weight": "fp8_e4m3"}}, "quantization is not supported"),
        ({"_sliding_window": 4096}, "_sliding_window is not supported"),
        ({"sliding_window": [4096, None]}, "sliding_window is not supported"),
    ],
)
def test_options_of_params_json_that_are_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(MinisaError, match=says):
        config_from_params({"dim": 8, "n_heads": 1, "n_layers": 1, "hidden_dim": 8, **changes}, 8)


def test_metas_llama_3_2_has_the_factor_of_hugging_faces() -> None:
    meta = {"dim": 2048, "n_layers": 16, "n_heads": 32, "n_kv_heads": 8, "ffn_dim_multiplier": 1.5, "multiple_of": 256}
    config = config_from_params({**meta, "rope_theta": 500000.0, "use_scaled_rope": True}, 128256)
    assert config.rope_scaling == PRESETS["llama3.2-1b"].rope_scaling


ATTENTION = 1 + 0.1 * math.log(4)


@pytest.mark.parametrize(
    ("keys", "scaling"),
    [
        ({"scaling.type": "linear", "scaling.factor": 4.0}, RopeScaling("linear", 4.0)),
        ({"scaling.factor": 4.0}, RopeScaling("linear", 4.0)),
        ({"scale_linear": 4.0}, RopeScaling("linear", 4.0)),
        ({"scaling.type": "none", "scaling.factor": 4.0}, None),
        ({"scaling.factor": 0.0}, None),
        (
            {"scaling.type": "yarn", "scaling.factor": 4.0, "scaling.yarn_beta_fast": 16.0},
            RopeScaling("yarn", 4.0, original_max_seq_len=8192, beta_fast=16.0, attention_factor=ATTENTION),
        ),
        (
            {"scaling.type": "yarn", "scaling.factor": 4.0, "scaling.original_context_length": 2048},
            RopeScaling("yarn", 4.0, original_max_seq_len=2048, attention_factor=ATTENTION),
        ),
    ],
)
def test_gguf_scaling_as_llama_cpp_reads_it(keys: dict[str, Any], scaling: RopeScaling | None) -> None:
    metadata = GGUF | {f"llama.rope.{key}": value for key, value in keys.items()}
    assert config_from_gguf(metadata, tied=True).rope_scaling == scaling
    if scaling:
        with pytest.raises(MinisaError, match=r"both rope_freqs\.weight and a llama"):
            config_from_gguf(metadata, tied=True, rope_factors=(1.0,) * 32)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"general.architecture": "qwen2"}, "general.architecture 'qwen2' is not supported: expected 'llama'"),
        ({"llama.expert_count": 8}, "expert_count 8 is not supported: expected 0"),
        ({"llama.rope.dimension_count": 32}, "rope.dimension_count 32 is not supported: expected 64"),
        ({"llama.rope.scaling.attn_factor": 0.5}, "rope.scaling.attn_factor 0.5 is not supported: expected 1"),
        ({"llama.rope.scaling.yarn_ext_factor": 0.5}, "rope.scaling.yarn_ext_factor 0.5 is not supported"),
        ({"llama.attention.layer_norm_rms_epsilon": None}, "layer_norm_rms_epsilon is missing"),
        ({"llama.attention.causal": False}, "attention.causal False is not supported: expected True"),
        ({"llama.rope.scaling.type": "longrope"}, "rope_scaling type 'longrope' is not supported"),
    ],
)
def test_gguf_metadata_that_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(MinisaError, match=says):
        config_from_gguf({**GGUF, **changes}, tied=True)
