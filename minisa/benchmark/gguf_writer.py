"""write_gguf: minisa's weights as a GGUF file without a tokenizer, for llama.cpp to read in the same run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minisa.benchmark.contender import Opening
from minisa.checkpoint.layouts import interleave
from minisa.checkpoint.names import GGUF, Naming
from minisa.config import ModelConfig
from minisa.device import DTYPES
from minisa.errors import MinisaError
from minisa.rope import rope_frequencies

TYPES = {"int8": "Q8_0", "int4": "Q4_0", "fp32": "F32", "bf16": "BF16"}  # as many bits as minisa runs with


def ggml_type(opening: Opening) -> str:
    return TYPES[opening.quantize or opening.dtype]


def check(opening: Opening) -> None:
    """Raises MinisaError where llama.cpp cannot do the same work."""
    window = opening.config.sliding_window
    if opening.device.type != "cpu":
        raise MinisaError("--against llama.cpp: compares on the CPU only; add --device cpu")
    if opening.quantize is None and opening.dtype not in TYPES:
        raise MinisaError(f"--against llama.cpp: has no format for it; leave out --dtype {opening.dtype}")
    if window is not None and opening.context > window:
        raise MinisaError(f"--against llama.cpp: ignores the window of {window} tokens; take smaller --contexts")


def write_gguf(opening: Opening, path: Path) -> None:
    """Write the weights to `path`, matrices as `ggml_type` says and norms as F32.

    With Q4_0 the embeddings and the output head are Q8_0: llama.cpp's own tool leaves them more bits too.
    """
    from gguf import GGMLQuantizationType, GGUFWriter, quants

    config = opening.config
    writer = GGUFWriter(path, "llama")

    def add(name: str, weight: Tensor, kind: str) -> None:
        code = GGMLQuantizationType[kind]
        writer.add_tensor(name, quants.quantize(weight.float().cpu().numpy(), code), raw_dtype=code)

    _describe(writer, config)
    matrices = ggml_type(opening)
    weights = opening.weights(torch.float32 if opening.quantize else DTYPES[opening.dtype]).state_dict()
    for name in list(weights):
        weight, inside = weights.pop(name), name.startswith("layers.")
        if name.endswith(("attention.wq.weight", "attention.wk.weight")):
            weight = interleave(weight, config.head_dim)  # RoPE turns neighbours in GGUF
        kind = "F32" if weight.ndim == 1 else matrices if inside or matrices != "Q4_0" else "Q8_0"
        add(foreign_name(name, GGUF, "blk."), weight, kind)
    if config.rope_scaling is not None:  # by how much each rotary frequency is divided
        unscaled = rope_frequencies(replace(config, rope_scaling=None))
        add("rope_freqs.weight", unscaled / rope_frequencies(config), "F32")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def foreign_name(parameter: str, naming: Naming, layers: str) -> str:
    """What a format calls one of our parameters; `layers` is what it puts before a layer's number."""
    stem, table, prefix = parameter.removesuffix(".weight"), naming.outside, ""
    if stem.startswith("layers."):
        _, number, stem = stem.split(".", 2)
        table, prefix = naming.inside, f"{layers}{number}."
    return prefix + next(theirs for theirs, ours in table.items() if ours == stem) + ".weight"


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
