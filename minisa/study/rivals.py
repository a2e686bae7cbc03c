"""What else makes a KV cache smaller without training, built from a loaded plain model, to compare sharing with.

    drop:7,9          layers 7 and 9 without attention: x + ffn(x) only (He et al., arXiv 2406.15786, "LLM-Drop")
    cla:19:21,25:27   layers 21 and 27 attend, with queries of their own, to the keys and values of layers 19 and 25
                      (Brandon et al., arXiv 2405.12981, "Cross-Layer Attention", but without its training)
    kv-int8           keys and values in eight bits, with one scale for each token and head

`+kv-int8` goes after any of the others, and after a plan of attention sharing, `sa:19:21+kv-int8`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from minisa.attention import AttentionBackend, HeadMap, Shared, Visible
from minisa.cache import StaticCache
from minisa.config import ModelConfig
from minisa.errors import MinisaError
from minisa.model import Layer, Transformer
from minisa.rope import apply_rope
from minisa.sharing import SharingPlan

SCALE_BYTES = 2  # of a scale in kv-int8: fp16
SMALLEST_SCALE = 2.0**-24  # fp16's own smallest; below it a vector counts as zero
NOTATION = "drop:LAYER,LAYER, cla:LEADER:LAYER, kv-int8, or one of them and sa:PLAN with +kv-int8"


@dataclass(frozen=True, slots=True)
class Rival:
    """Changes to a plain model.

    dropped: layers that lose their attention. borrowed: {layer: the earlier layer whose keys and values it uses}.
    int8: whether keys and values are rounded to eight bits.
    """

    dropped: frozenset[int] = frozenset()
    borrowed: dict[int, int] = field(default_factory=dict)
    int8: bool = False

    @classmethod
    def parse(cls, text: str, n_layers: int) -> Rival:
        """From the notation above, `sa:` apart. MinisaError for what it is not."""
        dropped: frozenset[int] = frozenset()
        borrowed: dict[int, int] = {}
        int8 = False
        kinds = set()
        for part in text.split("+"):
            kind, _, rest = part.strip().partition(":")
            if kind == "drop":
                dropped = _layers(rest, n_layers)
            elif kind == "cla":
                plan = SharingPlan.parse(rest, n_layers)
                borrowed = {layer: plan.sources[layer] for layer in plan.followers}
            elif kind == "kv-int8" and not rest:
                int8 = True
            else:
                raise MinisaError(f"--rival {text}: {part.strip()!r} is not known: expected {NOTATION}")
            kinds.add(kind)
        if len(kinds) < text.count("+") + 1 or {"drop", "cla"} <= kinds:
            raise MinisaError(f"--rival {text}: only kv-int8 goes with another: expected {NOTATION}")
        return cls(dropped, borrowed, int8)

    def __str__(self) -> str:
        """The notation; parse() of it gives this rival again."""
        parts = []
        if self.dropped:
            parts.append("drop:" + ",".join(map(str, sorted(self.dropped))))
        if self.borrowed:
            parts.append("cla:" + ",".join(f"{source}:{layer}" for layer, source in sorted(self.borrowed.items())))
        return "+".join(parts + ["kv-int8"] * self.int8) or "none"


def slot_bytes(config: ModelConfig, plan: SharingPlan, rival: Rival | None = None, itemsize: int = 2) -> int:
    """Bytes of keys and values that one token takes in the cache, over all layers.

    itemsize: bytes of an element that is not in eight bits (2 for bf16).
    """
    rival = rival or Rival()
    values = plan.n_layers - len(rival.dropped) - len(rival.borrowed)
    keys = len(plan.leaders) - len(rival.dropped) - len(rival.borrowed)
    vector = config.head_dim + SCALE_BYTES if rival.int8 else config.head_dim * itemsize
    return (keys + values) * config.n_kv_heads * vector


@contextmanager
def altered(model: Transformer, rival: Rival) -> Iterator[None]:
    """The model as the rival has it; as before on leaving. The weights are the same tensors throughout.

    Raises MinisaError where a model that shares attention is to lose some of it.
    """
    if model.plan.followers and (rival.dropped or rival.borrowed):
        raise MinisaError("--rival: drop and cla are changes to plain attention: give them without a plan")
    layers = list(model.layers)
    backends = {layer: layer.backend for layer in layers if isinstance(layer, Layer)}
    try:
        for layer, backend in backends.items():
            if rival.int8:
                layer.backend = in_eight_bits(backend)
        for i in rival.dropped:
            model.layers[i] = WithoutAttention(model.layers[i])
        for i, source in rival.borrowed.items():
            model.layers[i] = Borrowing(model.layers[i], source)
        yield
    finally:
        for i, original in enumerate(layers):
            model.layers[i] = original
        for layer, backend in backends.items():
            layer.backend = backend


class Changed(Layer):
    """A layer with the parts of another, which works otherwise."""

    def __init__(self, layer: nn.Module) -> None:
        nn.Module.__init__(self)
        assert isinstance(layer, Layer)  # for the type checker
        self.backend = layer.backend
        self.attention_norm, self.attention = layer.attention_norm, layer.attention
        self.ffn_norm, self.feed_forward = layer.ffn_norm, layer.feed_forward


class WithoutAttention(Changed):
    """A layer whose attention is gone: it writes nothing to the cache."""

    def lead(
        self,
        x: Tensor,  # [B, T, dim]
        i: int,
        positions: Tensor,
        angles: tuple[Tensor, Tensor],
        visible: Visible,
        cache: StaticCache,
    ) -> tuple[Tensor, Shared]:
        return x + self.feed_forward(self.ffn_norm(x)), x  # nobody follows in a plain model


class Borrowing(Changed):
    """A layer that attends to the keys and values of an earlier one."""

    def __init__(self, layer: nn.Module, source: int) -> None:
        super().__init__(layer)
        self.source = source

    def lead(
        self,
        x: Tensor,  # [B, T, dim]
        i: int,
        positions: Tensor,
        angles: tuple[Tensor, Tensor],
        visible: Visible,
        cache: StaticCache,
    ) -> tuple[Tensor, Shared]:
        q = apply_rope(self.attention.queries(self.attention_norm(x)), angles)
        index = cache.key_index[self.source]
        assert index is not None  # every layer of a plain model has keys
        mixed, shared = self.backend.lead(q, cache.keys[index], cache.values[self.source], visible)
        return self.finish(x, mixed), shared


def in_eight_bits(backend: AttentionBackend) -> AttentionBackend:
    """The backend, for keys and values that have been through eight bits.

    They are rounded whenever they are read. Rounding them again changes nothing, so this is what a cache that
    stored eight bits would give.
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
    rounded = (wide / scale.clamp(min=SMALLEST_SCALE)).round().clamp(-127, 127)
    return (rounded * scale).type_as(x)


def _layers(text: str, n_layers: int) -> frozenset[int]:
    layers = [part.strip() for part in text.split(",")]
    if not all(layer.isdecimal() and len(layer) < 99 for layer in layers):
        raise MinisaError(f"--rival drop:{text}: expected layers, e.g. drop:7,9")
    outside = next((layer for layer in layers if int(layer) >= n_layers), None)
    if outside is not None:
        raise MinisaError(
            f"--rival drop:{text}: layer {outside} is outside the model, whose layers are 0 to {n_layers - 1}"
        )
    return frozenset(map(int, layers))
