"""write_gguf: minisa's weights as a GGUF file without a tokenizer, for llama.cpp to read in the same run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minisa.benchmark.contender import Opening
from minisa.benchmark.peers import foreign_name
from minisa.checkpoint.ggml import TYPES, GGMLType
from minisa.checkpoint.gguf import read_gguf
from minisa.checkpoint.layouts import interleave
from minisa.checkpoint.names import GGUF
from minisa.config import ModelConfig
from minisa.rope import rope_frequencies

ROWS = 4096  # quantized at a time
_TYPES = {type.name: type for type in TYPES.values()}


def ggml_type(opening: Opening) -> str:
    """The ggml type of as many bits as minisa runs with."""
    if opening.quantize is not None:
        return {"int8": "Q8_0", "int4": "Q4_0"}[opening.quantize]
    return {torch.float32: "F32", torch.bfloat16: "BF16"}[opening.dtype]


def own_gguf(opening: Opening) -> Path | None:
    """The checkpoint itself, if it is a GGUF file whose matrices are all of that type already."""
    path = opening.path
    if path is None or path.suffix != ".gguf":
        return None
    types = {info.type.name for info in read_gguf(path).tensors if len(info.shape) > 1}
    return path if types == {ggml_type(opening)} else None


def write_gguf(opening: Opening, path: Path) -> None:
    """Write the weights to `path`, matrices as `ggml_type` says and norms as F32.

    With Q4_0 the embeddings and the output head are Q8_0: llama.cpp's own tool leaves them more bits too.
    """
    from gguf import GGUFWriter

    config, kind = opening.config, ggml_type(opening)
    weights = opening.weights(torch.float32 if opening.quantize else opening.dtype).state_dict()
    writer = GGUFWriter(path, "llama")
    _describe(writer, config)
    kinds: dict[str, str] = {}
    for name, weight in weights.items():
        outer = not name.startswith("layers.")
        kinds[name] = "F32" if weight.ndim == 1 else "Q8_0" if kind == "Q4_0" and outer else kind
        _announce(writer, foreign_name(name, GGUF, "blk."), weight.shape, kinds[name])
    factors = _rope_factors(config)
    if factors is not None:
        _announce(writer, "rope_freqs.weight", factors.shape, "F32")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name in list(weights):
        weight = weights.pop(name)
        if name.endswith(("attention.wq.weight", "attention.wk.weight")):
            weight = interleave(weight, config.head_dim)  # RoPE turns neighbours in GGUF
        writer.write_tensor_data(_encode(weight, kinds[name]))
    if factors is not None:
        writer.write_tensor_data(_encode(factors, "F32"))
    writer.close()


def _describe(writer: Any, config: ModelConfig) -> None:
    writer.add_tokenizer_model("none")  # llama.cpp is given token ids
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.dim)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.hidden_dim)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_float32("llama.rope.scaling.attn_factor", config.attention_factor)


def _announce(writer: Any, name: str, shape: Sequence[int], kind: str) -> None:
    type = _TYPES[kind]
    *rows, width = shape
    row_bytes = width // type.block * type.nbytes
    nbytes = math.prod(rows) * row_bytes
    writer.add_tensor_info(name, (*rows, row_bytes), np.dtype(np.uint8), nbytes, raw_dtype=_code(type))


def _encode(weight: Tensor, kind: str) -> np.ndarray:
    from gguf import quants

    parts = [quants.quantize(rows.float().cpu().numpy(), _code(_TYPES[kind])) for rows in weight.split(ROWS)]
    return np.concatenate(parts).view(np.uint8)


def _rope_factors(config: ModelConfig) -> Tensor | None:
    """By how much each rotary frequency is divided."""
    if config.rope_scaling is None:
        return None
    return rope_frequencies(replace(config, rope_scaling=None)) / rope_frequencies(config)


def _code(type: GGMLType) -> Any:
    from gguf import GGMLQuantizationType

    return GGMLQuantizationType(type.code)
