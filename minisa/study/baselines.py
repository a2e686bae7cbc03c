"""Other ways to make a KV cache smaller without training, applied to a loaded plain model, to compare sharing with.

    drop:7,9          layers 7 and 9 with their attention dropped: x + ffn(x) only (He et al., arXiv 2406.15786,
                      "LLM-Drop")
    cla:19:21,25:27   layers 21 and 27 attend, with queries of their own, to the keys and values of an earlier layer:
                      19 and 25 (Brandon et al., arXiv 2405.12981, "Cross-Layer Attention", without its training)
    kv-int8           keys and values in eight bits, with one scale for each token and head

`+kv-int8` goes after any of the others, and after a plan of attention sharing, `sa:19:21+kv-int8`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import Tensor

from minisa.attention import AttentionBackend, HeadMap, Shared, Visible
from minisa.cache import StaticCache
from minisa.config import ModelConfig
from minisa.errors import MinisaError
from minisa.model import Layer, Transformer
from minisa.rope import apply_rope
from minisa.sharing import SharingPlan

SCALE_BYTES = 2  # of a scale in kv-int8: fp16
MIN_SCALE = 2.0**-24  # fp16's smallest; below it a vector counts as zero
NOTATION = "drop:LAYER,LAYER, cla:LEADER:LAYER, kv-int8, or one of them and sa:PLAN with +kv-int8"


@dataclass(frozen=True, slots=True)
class Baseline:
    """Changes to a plain model.

    dropped: layers that lose their attention. borrowed: {layer: the earlier layer whose keys and values it uses}.
    int8: whether keys and values are rounded to eight bits.
    """

    dropped: frozenset[int] = frozenset()
    borrowed: dict[int, int] = field(default_factory=dict)
    int8: bool = False

    @classmethod
    def parse(cls, text: str, n_layers: int) -> Baseline:
        """From the notation above, `sa:` apart. Raises MinisaError for anything else."""
        base, plus, rest = text.partition("+")
        kind, _, layers = base.partition(":")
        if text == "kv-int8":
            return cls(int8=True)
        if kind not in ("drop", "cla") or plus + rest not in ("", "+kv-int8"):
            raise MinisaError(f"--baseline {text}: expected {NOTATION}")
        if kind == "drop":
            return cls(dropped=_layers(layers, n_layers), int8=bool(plus))
        plan = SharingPlan.parse(layers, n_layers)
        return cls(borrowed={layer: plan.sources[layer] for layer in plan.followers}, int8=bool(plus))

    def __str__(self) -> str:
        """The notation; parse() of it gives this baseline again."""
        parts = []
        if self.dropped:
            parts.append("drop:" + ",".join(map(str, sorted(self.dropped))))
        if self.borrowed:
            parts.append("cla:" + ",".join(f"{source}:{layer}" for layer, source in sorted(self.borrowed.items())))
        return "+".join(parts + ["kv-int8"] * self.int8) or "none"


def _layers(text: str, n_layers: int) -> frozenset[int]:
    names = text.split(",")
    inside = set(map(str, range(n_layers)))
    if not inside.issuperset(names):
        raise MinisaError(f"--baseline drop:{text}: expected layers of the model, 0 to {n_layers - 1}, e.g. drop:7,9")
    return frozenset(map(int, names))


def slot_bytes(config: ModelConfig, plan: SharingPlan, baseline: Baseline = Baseline()) -> int:
    """Bytes of keys and values that one token takes in the cache over all layers, in bf16 if not in eight bits."""
    without = len(baseline.dropped) + len(baseline.borrowed)
    keys, values = len(plan.leaders) - without, plan.n_layers - without
    vector = config.head_dim + SCALE_BYTES if baseline.int8 else config.head_dim * 2
    return (keys + values) * config.n_kv_heads * vector


@contextmanager
def altered(model: Transformer, baseline: Baseline) -> Iterator[None]:
    """The model as the baseline has it; as before on leaving. The weights are the same tensors throughout.

    Raises MinisaError where a model that shares attention is to lose some of it.
    """
    if model.plan.followers and (baseline.dropped or baseline.borrowed):
        raise MinisaError("--baseline: drop and cla are changes to plain attention: give them without a plan")
    layers = [layer for layer in model.layers if isinstance(layer, Layer)]
    backends = [layer.backend for layer in layers]
    try:
        for layer, backend in zip(layers, backends, strict=True):
            layer.backend = in_eight_bits(backend) if baseline.int8 else backend
        for i in baseline.dropped:
            layers[i].__dict__["lead"] = partial(lead_without_attention, layers[i])  # hides the method of the class
        for i, source in baseline.borrowed.items():
            layers[i].__dict__["lead"] = partial(lead_with_keys_of, source, layers[i])
        yield
    finally:
        for layer, backend in zip(layers, backends, strict=True):
            layer.backend = backend
            layer.__dict__.pop("lead", None)


def lead_without_attention(layer: Layer, x: Tensor, *_: Any) -> tuple[Tensor, Shared]:
    """Layer.lead with its attention dropped: nothing is written to the cache."""
    return x + layer.feed_forward(layer.ffn_norm(x)), None  # nobody follows in a plain model


def lead_with_keys_of(
    source: int, layer: Layer, x: Tensor, i: int, positions: Tensor, angles: Any, visible: Visible, cache: StaticCache
) -> tuple[Tensor, Shared]:
    """Layer.lead with the keys and values of an earlier layer."""
    q = apply_rope(layer.attention.queries(layer.attention_norm(x)), angles)
    index = cache.key_index[source]
    assert index is not None  # every layer of a plain model has keys
    mixed, shared = layer.backend.lead(q, cache.keys[index], cache.values[source], visible)
    return layer.finish(x, mixed), shared


def in_eight_bits(backend: AttentionBackend) -> AttentionBackend:
    """The backend, for keys and values that have been through eight bits.

    They are rounded whenever they are read. Rounding them again changes nothing, so this equals a cache that stores
    eight bits.
    """

    def lead(q: Tensor, k: Tensor, v: Tensor, visible: Visible) -> tuple[Tensor, Shared]:
        return backend.lead(q, round_to_int8(k), round_to_int8(v), visible)

    def follow(shared: Shared, v: Tensor, head_map: HeadMap | None) -> Tensor:
        return backend.follow(shared, round_to_int8(v), head_map)

    return replace(backend, lead=lead, follow=follow)


def round_to_int8(x: Tensor) -> Tensor:
    """x [..., D] as whole multiples, -127 to 127, of a scale for each vector [D] that is kept in fp16."""
    wide = x.float()
    scale = (wide.abs().amax(-1, keepdim=True) / 127).half().float()
    rounded = (wide / scale.clamp(min=MIN_SCALE)).round().clamp(-127, 127)
    return (rounded * scale).type_as(x)
