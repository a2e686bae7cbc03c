"""Tiny random checkpoints in every format minisa reads, from writers of our own.

`random_weights` are named and ordered as the model keeps them: Meta's names, q and k rows half-split. Each writer
turns them into what its format has. The formulas here are written apart from the ones in the package, on purpose.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minisa.checkpoint import read_gguf
from minisa.config import ModelConfig, RopeScaling
from minisa.model import Transformer
from minisa.sharing import SharingPlan
from tests.encode import GGML_CODES, encode_gguf, quantize, write_safetensors

Weights = Mapping[str, Tensor]

NAMES = """
tok_embeddings   model.embed_tokens        token_embd
norm             model.norm                output_norm
output           lm_head                   output
attention_norm   input_layernorm           attn_norm
attention.wq     self_attn.q_proj          attn_q
attention.wk     self_attn.k_proj          attn_k
attention.wv     self_attn.v_proj          attn_v
attention.wo     self_attn.o_proj          attn_output
ffn_norm         post_attention_layernorm  ffn_norm
feed_forward.w1  mlp.gate_proj             ffn_gate
feed_forward.w2  mlp.down_proj             ffn_down
feed_forward.w3  mlp.up_proj               ffn_up
"""
HF_NAMES, GGUF_NAMES = ({row.split()[0]: row.split()[column] for row in NAMES.split("\n")[1:-1]} for column in (1, 2))


def tiny_config(**overrides: Any) -> ModelConfig:
    """Four layers, 64 wide, four query heads on two key heads, 256 tokens."""
    shape: dict[str, Any] = {
        "dim": 64, "n_layers": 4, "n_heads": 4, "n_kv_heads": 2, "head_dim": 16, "hidden_dim": 128,
        "vocab_size": 256, "max_seq_len": 128,
    }  # fmt: skip
    return ModelConfig(**(shape | overrides))


def empty_model(config: ModelConfig, followers: Collection[int] = ()) -> Transformer:
    """On the meta device; each follower uses the weights of layer 0."""
    with torch.device("meta"):
        return Transformer(config, SharingPlan.following(config.n_layers, dict.fromkeys(followers, 0)))


def random_weights(config: ModelConfig, seed: int = 0) -> dict[str, Tensor]:
    """fp32; scaled so that attention is neither flat nor on one token, and logits spread by a few units."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, parameter in empty_model(config).named_parameters():
        shape = parameter.shape
        noise = torch.randn(shape, generator=generator)
        if len(shape) == 1:
            weights[name] = 1 + 0.2 * noise
        elif name == "tok_embeddings.weight":
            weights[name] = 0.5 * noise
        else:
            gain = 1.5 if name.endswith(("wq.weight", "wk.weight")) else 1.0
            weights[name] = gain * shape[1] ** -0.5 * noise
    return weights


def write_hf(
    directory: Path,
    config: ModelConfig,
    weights: Weights,
    shards: int = 1,
    dtype: torch.dtype = torch.float32,
    suffix: str = ".safetensors",
) -> Path:
    """config.json with model.safetensors or pytorch_model.bin, or with shards of it and their index."""
    directory.mkdir(parents=True, exist_ok=True)
    mistral = config.sliding_window is not None
    description = {
        "architectures": ["MistralForCausalLM" if mistral else "LlamaForCausalLM"],
        "model_type": "mistral" if mistral else "llama",
        "hidden_size": config.dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.hidden_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": _hf_rope_scaling(config.rope_scaling),
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": "silu",
        "torch_dtype": str(dtype).removeprefix("torch."),
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if mistral:
        description["sliding_window"] = config.sliding_window
    (directory / "config.json").write_text(json.dumps(description, indent=2))
    named = {_rename(name, HF_NAMES, "model.layers"): tensor.to(dtype) for name, tensor in weights.items()}
    stem = "model" if suffix == ".safetensors" else "pytorch_model"
    write = write_safetensors if suffix == ".safetensors" else lambda path, tensors: torch.save(tensors, path)
    if shards == 1:
        write(directory / f"{stem}{suffix}", named)
        return directory
    weight_map = {}
    for i in range(shards):
        file = f"{stem}-{i + 1:05}-of-{shards:05}{suffix}"
        part = dict(list(named.items())[i::shards])
        write(directory / file, part)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in named.values())}, "weight_map": weight_map}
    (directory / f"{stem}{suffix}.index.json").write_text(json.dumps(index))
    return directory


def write_meta(
    directory: Path,
    config: ModelConfig,
    weights: Weights,
    shards: int = 1,
    dtype: torch.dtype = torch.float32,
    split_embeddings: str = "rows",
) -> Path:
    """params.json with consolidated.NN.pth, one for each model-parallel rank.

    split_embeddings: "rows" as Llama 3 has them, "columns" as Llama 2. Meta's files never tie the output head.
    """
    directory.mkdir(parents=True, exist_ok=True)
    params = _params(config) | {
        "multiple_of": config.hidden_dim,  # two thirds of 4·dim, scaled below it, round up to hidden_dim
        "ffn_dim_multiplier": config.hidden_dim / (16 * config.dim / 3),
        "vocab_size": config.vocab_size if split_embeddings == "rows" else -1,
    }
    if config.rope_scaling:
        assert config.rope_scaling.kind == "llama3", "Meta's params.json has no other scaling"
        params |= {"use_scaled_rope": True, "rope_scaling_factor": config.rope_scaling.factor}
    (directory / "params.json").write_text(json.dumps(params))
    named = _interleaved(config, weights, dtype)
    for rank in range(shards):
        part = {}
        for name, tensor in named.items():
            columns = name.endswith(("wo.weight", "w2.weight"))
            columns |= name.startswith("tok_embeddings") and split_embeddings == "columns"
            part[name] = tensor if tensor.ndim == 1 else tensor.chunk(shards, int(columns))[rank].clone()
        part["rope.freqs"] = torch.ones(config.head_dim // 2)
        torch.save(part, directory / f"consolidated.{rank:02}.pth")
    return directory


def write_mistral(directory: Path, config: ModelConfig, weights: Weights, dtype: torch.dtype = torch.float32) -> Path:
    """params.json with consolidated.safetensors."""
    directory.mkdir(parents=True, exist_ok=True)
    params = _params(config) | {
        "head_dim": config.head_dim,
        "hidden_dim": config.hidden_dim,
        "vocab_size": config.vocab_size,
    }
    assert config.rope_scaling is None, "Mistral's params.json has no scaling"
    if config.sliding_window is not None:
        params["sliding_window"] = config.sliding_window
    (directory / "params.json").write_text(json.dumps(params))
    write_safetensors(directory / "consolidated.safetensors", _interleaved(config, weights, dtype))
    return directory


def write_gguf(
    path: Path,
    config: ModelConfig,
    weights: Weights,
    type: str = "F32",
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """A GGUF file of architecture llama: matrices as `type`, norms as F32, `metadata` on top of the model's own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    own: dict[str, Any] = {
        "general.architecture": "llama",
        "general.alignment": 32,
        "llama.vocab_size": config.vocab_size,
        "llama.context_length": config.max_seq_len,
        "llama.embedding_length": config.dim,
        "llama.block_count": config.n_layers,
        "llama.feed_forward_length": config.hidden_dim,
        "llama.attention.head_count": config.n_heads,
        "llama.attention.head_count_kv": config.n_kv_heads,
        "llama.attention.key_length": config.head_dim,
        "llama.attention.value_length": config.head_dim,
        "llama.attention.layer_norm_rms_epsilon": config.norm_eps,
        "llama.rope.dimension_count": config.head_dim,
        "llama.rope.freq_base": config.rope_theta,
    }
    if config.sliding_window is not None:
        own["llama.attention.sliding_window"] = config.sliding_window
    tensors: dict[str, tuple[str, Tensor]] = {}
    if config.rope_scaling and config.rope_scaling.kind in ("linear", "yarn"):
        own |= {"llama.rope.scaling.type": config.rope_scaling.kind}
        own |= {"llama.rope.scaling.factor": config.rope_scaling.factor}
        own |= {"llama.rope.scaling.original_context_length": config.rope_scaling.original_max_seq_len}
    elif config.rope_scaling:
        tensors["rope_freqs.weight"] = ("F32", torch.tensor(rope_factors(config)))
    for name, tensor in _interleaved(config, weights, torch.float32).items():
        if name == "output.weight" and config.tie_embeddings:
            continue
        tensors[_rename(name, GGUF_NAMES, "blk")] = ("F32" if tensor.ndim == 1 else type, tensor)
    path.write_bytes(
        encode_gguf(
            own | dict(metadata or {}),
            {
                name: (GGML_CODES[type], tuple(tensor.shape), quantize(tensor, type))
                for name, (type, tensor) in tensors.items()
            },
        )
    )
    return path


def split_gguf(whole: Path, count: int) -> list[Path]:
    """The file in parts, as llama.cpp writes them: all of the description in the first."""
    header, data = read_gguf(whole), whole.read_bytes()
    paths = [whole.with_name(f"parts-{i + 1:05}-of-{count:05}.gguf") for i in range(count)]
    for i, path in enumerate(paths):
        metadata: dict[str, Any] = {"split.no": i, "split.count": count, "split.tensors.count": len(header.tensors)}
        tensors = {
            info.name: (info.type.code, info.shape, data[info.offset : info.offset + info.nbytes])
            for info in header.tensors[i::count]
        }
        path.write_bytes(encode_gguf((header.metadata if i == 0 else {}) | metadata, tensors))
    whole.unlink()
    return paths


def _params(config: ModelConfig) -> dict[str, Any]:
    params = {
        "dim": config.dim,
        "n_layers": config.n_layers,
        "n_heads": config.n_heads,
        "n_kv_heads": config.n_kv_heads,
        "norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "max_seq_len": config.max_seq_len,
    }
    if config.head_dim * config.n_heads != config.dim:
        params["head_dim"] = config.head_dim
    return params


def _hf_rope_scaling(scaling: RopeScaling | None) -> dict[str, Any] | None:
    keys = {
        "linear": (),
        "yarn": ("beta_fast", "beta_slow", "attention_factor"),
        "llama3": ("low_freq_factor", "high_freq_factor"),
    }
    if scaling is None:
        return None
    described = {"rope_type": scaling.kind, "factor": scaling.factor}
    described |= {key: getattr(scaling, key) for key in keys[scaling.kind]}
    if scaling.kind != "linear":
        described["original_max_position_embeddings"] = scaling.original_max_seq_len
    return described


def rope_factors(config: ModelConfig) -> list[float]:
    """What a GGUF file's rope_freqs.weight holds: by how much each frequency is divided."""
    scaling = config.rope_scaling
    assert scaling is not None
    if scaling.kind == "factors":
        return list(scaling.factors)
    factors = []
    for i in range(config.head_dim // 2):
        turns = scaling.original_max_seq_len * config.rope_theta ** (-2 * i / config.head_dim) / (2 * math.pi)
        smooth = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        smooth = min(max(smooth, 0.0), 1.0)
        factors.append(1 / ((1 - smooth) / scaling.factor + smooth))
    return factors


def _interleaved(config: ModelConfig, weights: Weights, dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights with q and k rows as Meta keeps them, and an output head even where it is tied."""
    half = config.head_dim // 2
    order = [row for j in range(half) for row in (j, j + half)]  # within a head
    named = {}
    for name, tensor in weights.items():
        if name.endswith(("wq.weight", "wk.weight")):
            heads = tensor.split(config.head_dim)
            tensor = torch.cat([head[order] for head in heads])
        named[name] = tensor.to(dtype)
    named.setdefault("output.weight", named["tok_embeddings.weight"].clone())
    return named


def _rename(name: str, table: Mapping[str, str], layers: str) -> str:
    stem = name.removesuffix(".weight")
    if stem.startswith("layers."):
        _, number, module = stem.split(".", 2)
        return f"{layers}.{number}.{table[module]}.weight"
    return f"{table[stem]}.weight"
