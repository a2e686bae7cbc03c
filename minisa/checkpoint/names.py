"""What each format calls the tensors of a Llama.

The model's parameters bear the names Meta gave them, as do Meta's and Mistral's own files. Tensors that no Llama has
(biases, quantization scales, another architecture's parts) have no name here, and loading refuses a file with them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

Stored = TypeVar("Stored")

# The model (and Meta)    Hugging Face                GGUF
_IN_LAYER = (
    ("attention_norm",  "input_layernorm",          "attn_norm"),
    ("attention.wq",    "self_attn.q_proj",         "attn_q"),
    ("attention.wk",    "self_attn.k_proj",         "attn_k"),
    ("attention.wv",    "self_attn.v_proj",         "attn_v"),
    ("attention.wo",    "self_attn.o_proj",         "attn_output"),
    ("ffn_norm",        "post_attention_layernorm", "ffn_norm"),
    ("feed_forward.w1", "mlp.gate_proj",            "ffn_gate"),
    ("feed_forward.w2", "mlp.down_proj",            "ffn_down"),
    ("feed_forward.w3", "mlp.up_proj",              "ffn_up"),
)  # fmt: skip
_OUTSIDE = (
    ("tok_embeddings", "model.embed_tokens", "token_embd"),
    ("norm",           "model.norm",         "output_norm"),
    ("output",         "lm_head",            "output"),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Naming:
    """One format's names.

    layer: matches a tensor inside a layer; its groups are the layer's number and the module.
    inside, outside: the format's modules → the model's, inside a layer and around the layers.
    rope: tables of rotary frequencies that some files carry; the model computes its own from the config.
    """

    layer: re.Pattern[str]
    inside: Mapping[str, str]
    outside: Mapping[str, str]
    rope: re.Pattern[str]

    def rename(self, tensors: Mapping[str, Stored]) -> tuple[dict[str, Stored], tuple[str, ...]]:
        """The tensors under the model's names, in their order, and the names of those it does not know."""
        known: dict[str, Stored] = {}
        unknown = []
        for name, tensor in tensors.items():
            layer, module = self.layer.fullmatch(name), name.removesuffix(".weight")
            if layer and layer[2] in self.inside:
                known[f"layers.{layer[1]}.{self.inside[layer[2]]}.weight"] = tensor
            elif module != name and module in self.outside:
                known[f"{self.outside[module]}.weight"] = tensor
            elif not self.rope.fullmatch(name):
                unknown.append(name)
        return known, tuple(unknown)


def _naming(column: int, prefix: str, rope: str) -> Naming:
    return Naming(
        layer=re.compile(re.escape(prefix) + r"(0|[1-9][0-9]{0,3})\.(.+)\.weight"),
        inside={row[column]: row[0] for row in _IN_LAYER},
        outside={row[column]: row[0] for row in _OUTSIDE},
        rope=re.compile(rope),
    )


META = _naming(0, "layers.", r"rope\.freqs|layers\.\d+\.attention\.inner_attention\.rope\.freqs")
HUGGING_FACE = _naming(1, "model.layers.", r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
GGUF = _naming(2, "blk.", r"rope_freqs\.weight|blk\.\d+\.attn_rot_embd\.weight")
