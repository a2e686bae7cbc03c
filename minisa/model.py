"""The Transformer: Llama's layers, some of which follow.

    leader   x → norm → q,k,v → RoPE → P = softmax(q·Kᵀ/√d + mask) → P·V   → wo → + → ffn
                                        │ shared, per query head
    follower x → norm →     v →         └────────────────────────→ P·V_own → wo → + → ffn

A pure function of (tokens, positions, cache). Parameters carry Meta's names; q and k rows are in the half-split
RoPE order. A follower has no wq and no wk.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minisa.attention import TORCH, AttentionBackend, HeadMap, Shared, Visible
from minisa.cache import StaticCache
from minisa.config import ModelConfig
from minisa.rope import apply_rope, rope_angles, rope_frequencies
from minisa.sharing import SharingPlan


class Transformer(nn.Module):
    """tokens [B, T] at positions [B, T] → logits [B, T, vocab_size] in the weights' dtype.

    Build it under `torch.device("meta")` and fill it with `checkpoint.load_weights`.
    Raises MinisaError where the plan does not fit the config.
    """

    rope_frequencies: Tensor

    def __init__(self, config: ModelConfig, plan: SharingPlan, backend: AttentionBackend = TORCH) -> None:
        super().__init__()
        self.config = config
        self.plan = plan.check(config)
        self.tok_embeddings = Embedding(config.vocab_size, config.dim)
        self.backend = backend
        self.layers = nn.ModuleList(
            Layer(config, follows=plan.sources[i] != i, head_map=plan.head_maps[i], backend=backend)
            for i in range(config.n_layers)
        )
        self.norm = RMSNorm(config)
        self.output = None if config.tie_embeddings else nn.Linear(config.dim, config.vocab_size, bias=False)
        self.register_buffer("rope_frequencies", rope_frequencies(config), persistent=False)
        self.last_use = {leader: followers[-1] for leader, followers in plan.spans.items()}

    def forward(self, tokens: Tensor, positions: Tensor, cache: StaticCache) -> Tensor:
        return self.head(self.hidden(tokens, positions, cache))

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """RoPE's cos and sin at positions [B, T]: each [B, 1, T, head_dim / 2], fp32."""
        return rope_angles(self.rope_frequencies, positions, self.config.attention_factor)

    def hidden(self, tokens: Tensor, positions: Tensor, cache: StaticCache) -> Tensor:
        """The final hidden states [B, T, dim] of tokens [B, T], after the last norm; keys and values go to the cache.

        positions [B, T] int64 ascend along T and lie inside the cache; they attend to what lies before them and to
        themselves. For T > 1 with one row, or in a ring, they must be the cache's last T (Triton's kernels take a few
        positions anywhere, except in a ring).
        """
        angles = self.angles(positions)
        read_at, n_slots, ring = cache.as_read(positions)
        visible = self.backend.visible(read_at, n_slots, self.config.sliding_window, ring)
        shared: dict[int, Shared] = {}  # what each leader left, until its last follower has read it
        x = self.tok_embeddings(tokens)  # [B, T, dim]
        for i, layer in enumerate(self.layers):
            assert isinstance(layer, Layer)  # for the type checker
            leader = self.plan.sources[i]
            if leader == i:
                x, left = layer.lead(x, i, positions, angles, visible, cache)
                if i in self.last_use:
                    shared[i] = left
            else:
                x = layer.follow(x, i, positions, shared[leader], cache)
                if self.last_use[leader] == i:
                    del shared[leader]
        return self.norm(x)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [..., vocab_size] for hidden states [..., dim]."""
        return self.tok_embeddings.head(hidden) if self.output is None else self.output(hidden)


class Layer(nn.Module):
    """Attention and feed-forward, each on a normalized copy of x and added to it."""

    def __init__(
        self, config: ModelConfig, follows: bool, head_map: tuple[int, ...] | None, backend: AttentionBackend
    ) -> None:
        super().__init__()
        self.backend = backend
        self.attention_norm = RMSNorm(config)
        self.attention = Attention(config, follows, head_map)
        self.ffn_norm = RMSNorm(config)
        self.feed_forward = FeedForward(config)

    def lead(
        self,
        x: Tensor,
        i: int,
        positions: Tensor,
        angles: tuple[Tensor, Tensor],
        visible: Visible,
        cache: StaticCache,
    ) -> tuple[Tensor, Shared]:
        """x [B, T, dim] after layer i, and what its followers need. positions [B, T]; angles: their cos and sin."""
        q, k, v = self.project(x, angles)
        keys, values = cache.update_keys(i, positions, k), cache.update_values(i, positions, v)
        mixed, shared = self.backend.lead(q, keys, values, visible)
        return self.finish(x, mixed), shared

    def follow(self, x: Tensor, i: int, positions: Tensor, shared: Shared, cache: StaticCache) -> Tensor:
        """x [B, T, dim] after layer i, with the attention weights of the leader that left `shared`."""
        values = cache.update_values(i, positions, self.project_values(x))
        return self.finish(x, self.backend.follow(shared, values, self.attention.head_map))

    # The parts of a layer that touch no cache: pure functions of x, which runners/eager.py compiles.

    def project(self, x: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """A leader's q [B, H, T, D], k and v [B, Hkv, T, D], q and k turned by their positions."""
        q, k, v = self.attention(self.attention_norm(x))
        turned = apply_rope(torch.cat((q, k), dim=1), angles)  # one kernel for both
        return *turned.split((q.shape[1], k.shape[1]), dim=1), v

    def project_values(self, x: Tensor) -> Tensor:
        """A follower's v [B, Hkv, T, D]."""
        return self.attention.values(self.attention_norm(x))

    def finish(self, x: Tensor, mixed: Tensor) -> Tensor:
        """x [B, T, dim] after the layer, for attention's output [B, H, T, D]."""
        return self.down(*self.up(x, mixed))

    # In two: a compiler that sees both would recompute the hidden activations for every row of w2.

    def up(self, x: Tensor, mixed: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, T, dim] after attention, and the feed-forward's activations [B, T, hidden_dim]."""
        x = x + self.attention.wo(mixed.transpose(1, 2).flatten(2))  # [B, H, T, D] → [B, T, H·D] → [B, T, dim]
        return x, self.feed_forward.hidden(self.ffn_norm(x))

    def down(self, x: Tensor, hidden: Tensor) -> Tensor:
        """x [B, T, dim] after the layer."""
        return x + self.feed_forward.w2(hidden)


class Attention(nn.Module):
    """The projections around the attention weights; a follower has wv and wo only."""

    head_map_heads: Tensor | None
    head_map_keys: Tensor | None

    def __init__(self, config: ModelConfig, follows: bool, head_map: tuple[int, ...] | None) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        n_queries, n_keys = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        if not follows:
            self.wq = nn.Linear(config.dim, n_queries, bias=False)
            self.wk = nn.Linear(config.dim, n_keys, bias=False)
        self.wv = nn.Linear(config.dim, n_keys, bias=False)
        self.wo = nn.Linear(n_queries, config.dim, bias=False)
        self.wqkv: nn.Module | None = None
        self.widths = (n_queries, n_keys, n_keys)
        # On the CPU even under torch.device("meta"): it is data of the plan, and no weight will fill it.
        self.set_head_map(head_map, device="cpu")

    @property
    def head_map(self) -> HeadMap | None:
        return None if self.head_map_heads is None else HeadMap(self.head_map_heads, self.head_map_keys)

    def set_head_map(self, heads: tuple[int, ...] | None, device: torch.device | str) -> None:
        """Use the leader's weights by this map; None is the identity."""
        n_queries, n_keys, _ = (width // self.head_dim for width in self.widths)
        mapped = None if heads is None or heads == tuple(range(n_queries)) else HeadMap.of(heads, n_keys, device)
        self.register_buffer("head_map_heads", mapped and mapped.heads, persistent=False)
        self.register_buffer("head_map_keys", mapped and mapped.keys, persistent=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A leader's q [B, H, T, D], k and v [B, Hkv, T, D], before RoPE."""
        if self.wqkv is None:
            return self.queries(x), self.keys(x), self.values(x)
        q, k, v = self.wqkv(x).split(self.widths, dim=-1)
        return self._heads(q), self._heads(k), self._heads(v)

    def join(self) -> None:
        """Make a leader's wq, wk and wv one matrix: apart, two of the three products are too small for a GPU."""
        parts = [self.wq, self.wk, self.wv]
        for name, first in (*parts[0].named_parameters(), *parts[0].named_buffers()):
            rows = torch.cat([getattr(part, name) for part in parts])
            setattr(parts[0], name, nn.Parameter(rows, False) if isinstance(first, nn.Parameter) else rows)
        self.wqkv = parts[0]
        del self.wq, self.wk, self.wv

    # For x [B, T, dim]: queries [B, H, T, D], keys and values [B, Hkv, T, D].

    def queries(self, x: Tensor) -> Tensor:
        return self._heads(self.wq(x))

    def keys(self, x: Tensor) -> Tensor:
        return self._heads(self.wk(x))

    def values(self, x: Tensor) -> Tensor:
        return self._heads(self.wv(x))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [B, T, H·D] → [B, H, T, D]


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) · w3 x), [..., dim] → [..., dim]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.hidden_dim, bias=False)
        self.w2 = nn.Linear(config.hidden_dim, config.dim, bias=False)
        self.w3 = nn.Linear(config.dim, config.hidden_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(self.hidden(x))

    def hidden(self, x: Tensor) -> Tensor:
        """[..., dim] → [..., hidden_dim]."""
        return F.silu(self.w1(x)) * self.w3(x)


class RMSNorm(nn.Module):
    """x / rms(x) · weight, the division in fp32."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.eps = config.norm_eps
        self.weight = nn.Parameter(torch.empty(config.dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return normed.type_as(x) * self.weight


class Embedding(nn.Module):
    """One row of weight for each token."""

    def __init__(self, vocab_size: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, dim))

    def forward(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.weight)

    def head(self, hidden: Tensor) -> Tensor:
        """What a tied head computes: each row's product with the hidden states."""
        return F.linear(hidden, self.weight)
