"""What a step costs, by formula: bytes read, bytes kept, floating-point operations.

The benchmark prints these beside what it measures; the tests hold the cache's formula to the byte.
n followers of L layers save n/(2L) of the KV cache.
"""

from __future__ import annotations

from dataclasses import dataclass

from minisa.config import ModelConfig
from minisa.sharing import SharingPlan

SHARED_ITEMSIZE = 4  # the C++ step and the kernels keep the rows that followers read in fp32
# Slots of a ring beyond the window, so that what is still to be seen survives what is written before it is seen (a
# chunk of the C++ step, wrong guesses) and what is taken back (the end of an answer that the next turn leaves out).
SLACK = 64


def parameter_count(config: ModelConfig, plan: SharingPlan) -> int:
    """Weights of the model: a follower has no wq and no wk; a tied head is counted once."""
    embeddings = config.vocab_size * config.dim * (1 if config.tie_embeddings else 2)
    norms = (2 * config.n_layers + 1) * config.dim
    return embeddings + norms + _layer_matrices(config, plan)


def weights_per_token(config: ModelConfig, plan: SharingPlan) -> int:
    """Weights of the matrices read to decode one token: every layer's and the head's."""
    return _layer_matrices(config, plan) + config.vocab_size * config.dim


def cache_slots(config: ModelConfig, length: int) -> int:
    """Slots a row of a cache has for `length` tokens: with a sliding window no more than a ring of it needs."""
    return length if config.sliding_window is None else min(length, config.sliding_window + SLACK)


def kv_bytes(config: ModelConfig, plan: SharingPlan, length: int, itemsize: int, batch: int = 1) -> int:
    """Bytes of a cache for `length` tokens a row: keys of leaders, values of every layer."""
    tensors = len(plan.leaders) + plan.n_layers
    return tensors * batch * config.n_kv_heads * cache_slots(config, length) * config.head_dim * itemsize


@dataclass(frozen=True, slots=True)
class StepCost:
    """Bytes read, and operations done, to decode one token in each of `batch` rows."""

    weights: int
    keys: int
    values: int
    shared_rows: int  # attention weights that followers read in place of keys
    flops: int

    @property
    def bytes(self) -> int:
        return self.weights + self.keys + self.values + self.shared_rows


def step_cost(
    config: ModelConfig,
    plan: SharingPlan,
    context: int,
    *,
    weight_bytes: int,
    kv_itemsize: int,
    batch: int = 1,
) -> StepCost:
    """The cost of one decode step with `context` tokens in the cache.

    weight_bytes: of all the weights that it reads, as stored. Attention weights are passed on in fp32.
    """
    slots = batch * min(context, config.sliding_window or context)
    per_kv = config.n_kv_heads * config.head_dim * slots
    leaders, followers = len(plan.leaders), len(plan.followers)
    return StepCost(
        weights=weight_bytes,
        keys=leaders * per_kv * kv_itemsize,
        values=plan.n_layers * per_kv * kv_itemsize,
        shared_rows=followers * config.n_heads * slots * SHARED_ITEMSIZE,
        flops=2 * batch * weights_per_token(config, plan) + _attention_flops(config, plan, slots),
    )


def prefill_flops(config: ModelConfig, plan: SharingPlan, tokens: int) -> int:
    """Operations to feed one row a prompt: a token attends to those before it and itself, the last alone needs the
    head. PyTorch computes a follower's q·K again in a prompt; that is not counted, as it need not be.
    """
    window = min(config.sliding_window or tokens, tokens)
    attended = window * (window + 1) // 2 + (tokens - window) * window
    weights = tokens * _layer_matrices(config, plan) + config.vocab_size * config.dim
    return 2 * weights + _attention_flops(config, plan, attended)


def _attention_flops(config: ModelConfig, plan: SharingPlan, slots: int) -> int:
    """q·K in leaders and P·V in every layer."""
    return 2 * config.n_heads * config.head_dim * slots * (len(plan.leaders) + plan.n_layers)


def _layer_matrices(config: ModelConfig, plan: SharingPlan) -> int:
    q_and_k = config.dim * (config.n_heads + config.n_kv_heads) * config.head_dim
    v_and_o = config.dim * (config.n_kv_heads + config.n_heads) * config.head_dim
    feed_forward = 3 * config.dim * config.hidden_dim
    return len(plan.leaders) * q_and_k + plan.n_layers * (v_and_o + feed_forward)
