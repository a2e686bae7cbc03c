"""A model run layer by layer over whole windows of text, so that a study can look in, and go on from any layer.

The same arithmetic as Transformer.hidden for windows that begin at position 0, without a cache.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from minisa.attention import TORCH, Queries, visible_slots
from minisa.model import Layer, Transformer
from minisa.rope import apply_rope
from minisa.sharing import SharingPlan


def share(model: Transformer, plan: SharingPlan) -> Transformer:
    """The same weights under another plan; no weight is copied.

    The plan's followers may lead in `model`, not the other way round: a follower's wq and wk are gone.
    """
    with torch.device("meta"):
        shared = Transformer(model.config, plan)
    weights = model.state_dict()
    shared.load_state_dict({name: weights[name] for name in shared.state_dict()}, assign=True)
    return shared.to(model.norm.weight.device).requires_grad_(False)  # the buffers move, the weights are there


def replace(model: Transformer, weights: Mapping[str, Tensor]) -> Transformer:
    """model, with these parameters in the place of its own; whoever shares the old ones keeps them."""
    device = model.norm.weight.device
    copies = {name: tensor.to(device, copy=True) for name, tensor in weights.items()}
    model.load_state_dict(copies, strict=False, assign=True)
    return model.requires_grad_(False)


def set_head_map(model: Transformer, i: int, heads: tuple[int, ...]) -> None:
    """Give follower i another head map; the model's plan keeps its own."""
    layer = model.layers[i]
    assert isinstance(layer, Layer)  # for the type checker
    layer.attention.set_head_map(heads, model.norm.weight.device)


def layer_of(name: str) -> int:
    """The layer a parameter belongs to: 21 for layers.21.attention.wo.weight."""
    return int(name.split(".")[1])


class Walk:
    """A model's layers, one at a time, over hidden states x [N, T, dim] of windows [N, T].

    A layer's `queries` are what it leads with, its `mixed` heads [N, T, H·D] what goes into wo.
    """

    def __init__(self, model: Transformer) -> None:
        self.model = model
        self.plan = model.plan
        self._length = 0

    def embed(self, windows: Tensor) -> Tensor:
        """x before layer 0 for tokens [N, T]."""
        return self.model.tok_embeddings(windows.to(self.model.norm.weight.device))

    def queries(self, i: int, x: Tensor) -> Queries:
        """What the attention weights of layer i follow from. It must have wq and wk."""
        layer = self._layer(i)
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

    def values(self, i: int, x: Tensor) -> Tensor:
        """Layer i's own values [N, Hkv, T, D]."""
        layer = self._layer(i)
        return layer.attention.values(layer.attention_norm(x))

    def mixed(self, i: int, x: Tensor, queries: Queries) -> Tensor:
        """Layer i's values under attention weights that follow from `queries`, through its head map."""
        mixed = TORCH.follow(queries, self.values(i, x), self._layer(i).attention.head_map)
        return mixed.transpose(1, 2).flatten(2)  # [N, H, T, D] → [N, T, H·D]

    def add_attention(self, i: int, x: Tensor, mixed: Tensor) -> Tensor:
        """x after the attention half of layer i."""
        return x + self._layer(i).attention.wo(mixed)

    def add_feed_forward(self, i: int, x: Tensor) -> Tensor:
        """x after layer i, from x after its attention half."""
        layer = self._layer(i)
        return layer.down(x, self.gated(i, x))

    def gated(self, i: int, x: Tensor) -> Tensor:
        """What goes into w2 of layer i [N, T, hidden_dim], for x after its attention half."""
        layer = self._layer(i)
        return layer.feed_forward.hidden(layer.ffn_norm(x))

    def lead_or_follow(self, i: int, x: Tensor, shared: dict[int, Queries]) -> Queries:
        """The queries layer i uses. A leader's go to `shared` for its followers, which take them from there."""
        leader = self.plan.sources[i]
        if leader != i:
            return shared[leader]
        queries = self.queries(i, x)
        if i in self.model.last_use:
            shared[i] = queries
        return queries

    def layer(self, i: int, x: Tensor, shared: dict[int, Queries]) -> Tensor:
        """x after layer i."""
        x = self.add_attention(i, x, self.mixed(i, x, self.lead_or_follow(i, x, shared)))
        return self.add_feed_forward(i, x)

    def onward(self, states: list[Tensor], start: int, keep: bool = False) -> list[Tensor]:
        """Run the layers from `start` on: x [N, T, dim] after each of them, or after the last alone without `keep`.

        states: x before each of the layers 0..start. What followers from `start` on need of leaders before it is
        computed again from these.
        """
        shared = {leader: self.queries(leader, states[leader]) for leader in self._open_before(start)}
        x, found = states[start], []
        for i in range(start, self.plan.n_layers):
            x = self.layer(i, x, shared)
            if keep or i == self.plan.n_layers - 1:
                found.append(x)
        return found

    def _open_before(self, start: int) -> Iterable[int]:
        return (leader for leader, last in self.model.last_use.items() if leader < start <= last)

    def _layer(self, i: int) -> Layer:
        layer = self.model.layers[i]
        assert isinstance(layer, Layer)  # for the type checker
        return layer
