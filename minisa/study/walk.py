"""A model run layer by layer over whole windows of text, so that a study can look in and go on from any layer.

The same arithmetic as Transformer.hidden for windows that begin at position 0, without a cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from minisa.attention import TORCH, Queries, visible_slots
from minisa.model import Layer, Transformer
from minisa.rope import apply_rope
from minisa.sharing import SharingPlan


def share(model: Transformer, plan: SharingPlan) -> Transformer:
    """The same weights under another plan; no weight is copied.

    The plan's followers may lead in `model`, not the other way round: a follower has no wq and wk.
    """
    with torch.device("meta"):
        shared = Transformer(model.config, plan)
    weights = model.state_dict()
    shared.load_state_dict({name: weights[name] for name in shared.state_dict()}, assign=True)
    return shared.to(model.norm.weight.device).requires_grad_(False)  # moves the buffers; the weights are there


def replace(model: Transformer, weights: Mapping[str, Tensor]) -> Transformer:
    """model, with copies of these parameters in place of its own; models that share the old ones keep them."""
    device = model.norm.weight.device
    copies = {name: tensor.to(device, copy=True) for name, tensor in weights.items()}
    model.load_state_dict(copies, strict=False, assign=True)
    return model.requires_grad_(False)


def layer_of(name: str) -> int:
    """The layer a parameter belongs to: 21 for layers.21.attention.wo.weight."""
    return int(name.split(".")[1])


def attention_weights(queries: Queries, rows: slice = slice(None)) -> Tensor:
    """P [B, H, T, S] in fp32, as attention.py defines it. rows: of the T query positions, those that are wanted."""
    q, k, mask = queries
    slots = torch.arange(k.shape[2], device=q.device)
    visible = slots <= slots[rows, None] if mask is None else mask[..., rows, :]
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = (q[:, :, rows] @ k.mT).float() / q.shape[-1] ** 0.5
    return scores.masked_fill(~visible, float("-inf")).softmax(-1)


class Walk:
    """A model's layers, one at a time, over hidden states x [N, T, dim] of windows [N, T].

    `queries` are what a layer's attention weights follow from; `mixed` [N, T, H·D] is what goes into its wo.
    """

    def __init__(self, model: Transformer) -> None:
        self.model = model
        self.plan = model.plan
        self._length = 0

    def embed(self, windows: Tensor) -> Tensor:
        """x before layer 0 for tokens [N, T]."""
        return self.model.tok_embeddings(windows.to(self.model.norm.weight.device))

    def queries(self, i: int, x: Tensor) -> Queries:
        """The queries of layer i, which must have wq and wk."""
        layer = self.at(i)
        if x.shape[1] != self._length:
            self._length = x.shape[1]
            positions = torch.arange(self._length, device=x.device)[None]
            self._angles = self.model.angles(positions)
            self._mask = visible_slots(positions, self._length, self.model.config.sliding_window)
        normed = layer.attention_norm(x)
        q, k = (
            apply_rope(project(normed), self._angles) for project in (layer.attention.queries, layer.attention.keys)
        )
        return Queries(q, k, self._mask)

    def lead_or_follow(self, i: int, x: Tensor, shared: dict[int, Queries]) -> Queries:
        """The queries layer i uses. A leader's go to `shared`, from where its followers take them."""
        leader = self.plan.sources[i]
        if leader != i:
            return shared[leader]
        queries = self.queries(i, x)
        if i in self.model.last_use:
            shared[i] = queries
        return queries

    def values(self, i: int, x: Tensor) -> Tensor:
        """Layer i's own values [N, Hkv, T, D]."""
        layer = self.at(i)
        return layer.attention.values(layer.attention_norm(x))

    def mixed(self, i: int, x: Tensor, queries: Queries) -> Tensor:
        """Layer i's values under the attention weights of `queries`, through its head map."""
        mixed = TORCH.follow(queries, self.values(i, x), self.at(i).attention.head_map)
        return mixed.transpose(1, 2).flatten(2)  # [N, H, T, D] → [N, T, H·D]

    def add_attention(self, i: int, x: Tensor, queries: Queries) -> Tensor:
        """x after the attention half of layer i."""
        return x + self.at(i).attention.wo(self.mixed(i, x, queries))

    def add_feed_forward(self, i: int, x: Tensor) -> Tensor:
        """x after layer i, for x after its attention half."""
        layer = self.at(i)
        return layer.down(x, layer.feed_forward.hidden(layer.ffn_norm(x)))

    def layer(self, i: int, x: Tensor, shared: dict[int, Queries]) -> Tensor:
        """x after layer i."""
        return self.add_feed_forward(i, self.add_attention(i, x, self.lead_or_follow(i, x, shared)))

    def onward(self, states: Sequence[Tensor], start: int) -> Iterator[Tensor]:
        """x [N, T, dim] after each layer from `start` on.

        states: x before each of the layers 0..start, from which the queries of leaders before `start` are computed
        again for those who still follow them.
        """
        last_use = self.model.last_use.items()
        shared = {leader: self.queries(leader, states[leader]) for leader, last in last_use if leader < start <= last}
        x = states[start]
        for i in range(start, self.plan.n_layers):
            x = self.layer(i, x, shared)
            yield x

    def at(self, i: int) -> Layer:
        layer = self.model.layers[i]
        assert isinstance(layer, Layer)  # for the type checker
        return layer


class Streams(NamedTuple):
    """Some windows at one layer: x [N, T, dim] before it in the shared model, `wanted` after its attention half in the
    plain model. queries: what the shared layer uses."""

    wanted: Tensor
    x: Tensor
    queries: Queries


def side_by_side(plain: Walk, shared: Walk, parts: Sequence[Tensor], first: int) -> Iterator[tuple[int, list[Streams]]]:
    """Plain and shared model over the same windows: (layer, its streams) for each layer from `first` on, before the
    shared model runs it. The caller may change its wo or its head map then. The models must not differ before `first`.
    """
    pairs = [(x, x) for x in map(shared.embed, parts)]
    spans: list[dict[int, Queries]] = [{} for _ in parts]
    for i in range(first):
        xs = [shared.layer(i, x, span) for (_, x), span in zip(pairs, spans, strict=True)]
        pairs = [(x, x) for x in xs]
    for i in range(first, shared.plan.n_layers):
        streams = [
            Streams(plain.add_attention(i, wanted, plain.queries(i, wanted)), x, shared.lead_or_follow(i, x, span))
            for (wanted, x), span in zip(pairs, spans, strict=True)
        ]
        yield i, streams
        pairs = [
            (plain.add_feed_forward(i, wanted), shared.add_feed_forward(i, shared.add_attention(i, x, queries)))
            for wanted, x, queries in streams
        ]
