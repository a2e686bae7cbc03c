"""StaticCache: who owns keys, where things are written, and bytes to the byte."""

from __future__ import annotations

import itertools

import pytest
import torch

from minisa.benchmark.presets import PRESETS
from minisa.cache import StaticCache
from minisa.config import ModelConfig
from minisa.costs import kv_bytes
from minisa.errors import MinisaError
from minisa.sharing import SharingPlan
from tests.tiny import tiny_config


def config_of(n_heads: int, n_kv_heads: int) -> ModelConfig:
    return tiny_config(n_layers=6, n_heads=n_heads, n_kv_heads=n_kv_heads, dim=16 * n_heads, head_dim=16)


@pytest.mark.parametrize(
    ("spans", "dtype", "n_kv_heads", "batch"),
    list(
        itertools.product(
            ["none", "5", "1:2-3,4:5", "1-5"], [torch.float32, torch.bfloat16, torch.float8_e4m3fn], [1, 2, 4], [1, 3]
        )
    ),
)
def test_bytes_equal_the_formula(spans: str, dtype: torch.dtype, n_kv_heads: int, batch: int) -> None:
    config = config_of(4, n_kv_heads)
    plan = SharingPlan.parse(spans, 6)
    cache = StaticCache.allocate(config, plan, batch=batch, max_seq_len=37, dtype=dtype)
    assert cache.bytes() == kv_bytes(config, plan, 37, dtype.itemsize, batch)
    plain = kv_bytes(config, SharingPlan.none(6), 37, dtype.itemsize, batch)
    assert (plain - cache.bytes()) * 2 * 6 == plain * len(plan.followers)  # n followers of L layers save n/(2L)


def test_llama3_8b_by_hand() -> None:
    """32 layers of 8 heads of 128 in bf16, 8,192 tokens: 1 GiB; four followers save a sixteenth of it."""
    config = PRESETS["llama3-8b"]
    assert kv_bytes(config, SharingPlan.none(32), 8192, 2) == 1 << 30
    assert kv_bytes(config, SharingPlan.parse("23-26", 32), 8192, 2) == (1 << 30) * 15 // 16


def test_followers_own_no_keys() -> None:
    plan = SharingPlan.parse("1:2-3", 4)
    cache = StaticCache.allocate(tiny_config(n_layers=4), plan, max_seq_len=8)
    assert cache.key_index == (0, 1, None, None)
    assert (len(cache.keys), len(cache.values)) == (2, 4)
    with pytest.raises(AssertionError, match="layer 2 follows"):
        cache.update_keys(2, torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, 2, 1, 16))


@pytest.mark.parametrize("batch", [1, 2])
def test_update_writes_rows_at_their_own_positions(batch: int) -> None:
    config = tiny_config(n_layers=2)
    cache = StaticCache.allocate(config, SharingPlan.none(2), batch=batch, max_seq_len=8)
    positions = torch.tensor([[1, 2], [5, 6]])[:batch]
    new = torch.randn(batch, config.n_kv_heads, 2, config.head_dim)
    stored = cache.update_values(1, positions, new)
    for row in range(batch):
        assert torch.equal(stored[row, :, positions[row]], new[row])
        stored[row, :, positions[row]] = 0
    assert not stored.any()
    assert not cache.values[0].any()


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("position", [8, -1])
def test_writing_outside_is_an_error_never_a_wrap(batch: int, position: int) -> None:
    config = tiny_config(n_layers=2)
    cache = StaticCache.allocate(config, SharingPlan.none(2), batch=batch, max_seq_len=8)
    new = torch.ones(batch, config.n_kv_heads, 1, config.head_dim)
    with pytest.raises((IndexError, RuntimeError)):
        cache.update_values(0, torch.full((batch, 1), position), new)
    assert not cache.values.any()
    with pytest.raises(MinisaError, match="9 tokens do not fit a cache of 8"):
        cache.view(9)


def test_a_view_shares_memory() -> None:
    cache = StaticCache.allocate(tiny_config(n_layers=2), SharingPlan.none(2), batch=3, max_seq_len=8)
    view = cache.view(4, rows=slice(1, 2))
    assert (view.batch, view.length) == (1, 4)
    view.values.fill_(1)
    assert cache.values[:, 1, :, :4].all()
    assert cache.values.sum() == view.values.sum()


@pytest.mark.parametrize("batch", [1, 2])
def test_fp8_rounds_and_keeps_to_its_largest_number(batch: int) -> None:
    cache = StaticCache.allocate(
        tiny_config(n_layers=1), SharingPlan.none(1), batch=batch, max_seq_len=4, dtype=torch.float8_e4m3fn
    )
    new = torch.full((batch, 2, 1, 16), 0.3)
    new[..., 0], new[..., 1] = 1e6, -500.0
    kept = cache.update_values(0, torch.full((batch, 1), 2), new)[:, :, 2].float()
    assert kept[..., 0].eq(448).all() and kept[..., 1].eq(-448).all()
    assert kept[..., 2:].eq(0.3125).all()  # 1.25 · 2^-2: three bits of mantissa
    assert not cache.values[:, :, :, :2].float().any()
