"""A random model of six layers, plans for it, and its logits in one go."""

from __future__ import annotations

import torch
from torch import Tensor

from minisa.cache import StaticCache
from minisa.config import ModelConfig
from minisa.model import Transformer
from minisa.runners.choice import find_backend
from minisa.sharing import SharingPlan
from tests.tiny import random_weights, tiny_config

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
N_LAYERS = 6
SIX_LAYERS = tiny_config(n_layers=N_LAYERS, n_heads=4, n_kv_heads=2, max_seq_len=128)
PLANS = {
    "none": SharingPlan.none(N_LAYERS),
    "last": SharingPlan.parse("5", N_LAYERS),
    "span": SharingPlan.parse("2-4", N_LAYERS),
    "all": SharingPlan.parse("1-5", N_LAYERS),
    "interleaved": SharingPlan.parse("1:3,2:4", N_LAYERS),
    "head maps": SharingPlan.following(N_LAYERS, {2: 1, 3: 1, 5: 4}, {2: [3, 0, 0, 1], 5: [1, 0, 3, 2]}),
}


def build_model(config: ModelConfig, plan: SharingPlan, backend: str = "torch", seed: int = 0) -> Transformer:
    with torch.device("meta"):
        model = Transformer(config, plan, find_backend(backend, DEVICE))
    weights = random_weights(config, seed)
    model.load_state_dict({name: weights[name] for name in model.state_dict()}, assign=True)
    return model.requires_grad_(False)


def random_tokens(config: ModelConfig, batch: int, length: int) -> Tensor:
    return torch.randint(config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(length))


def in_one_go(model: Transformer, tokens: Tensor) -> Tensor:
    """Logits [B, T, vocab_size] of one forward pass."""
    batch, length = tokens.shape
    cache = StaticCache.allocate(model.config, model.plan, batch=batch, max_seq_len=length)
    return model(tokens, torch.arange(length).expand(batch, -1), cache)
