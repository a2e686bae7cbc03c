"""The C++ step against the reference in fp32: every plan, batches, chunks, windows."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from minisa.benchmark.synthetic import random_checkpoint
from minisa.cache import StaticCache, to_dtype
from minisa.checkpoint import load_weights
from minisa.config import ModelConfig
from minisa.costs import SLACK, parameter_count
from minisa.errors import MinisaError
from minisa.model import Transformer
from minisa.quantize import Format
from minisa.runners.eager import TorchRunner
from minisa.runners.native.runner import NativeRunner
from minisa.sharing import SharingPlan
from tests.families import FAMILIES
from tests.models import build_model, random_tokens
from tests.tiny import tiny_config

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

SHAPES: dict[str, ModelConfig] = {
    "gqa": tiny_config(n_layers=6, dim=128, n_heads=6, n_kv_heads=2, head_dim=32, hidden_dim=160, vocab_size=300),
    "mha": tiny_config(n_layers=6, dim=96, n_heads=3, n_kv_heads=3, head_dim=32, hidden_dim=96, vocab_size=257),
    "one kv head": tiny_config(n_layers=6, dim=64, n_heads=5, n_kv_heads=1, head_dim=64, hidden_dim=64, vocab_size=256),
    "tied": tiny_config(n_layers=6, dim=64, n_heads=2, n_kv_heads=1, head_dim=32, hidden_dim=64, tie_embeddings=True),
}
PLANS = {"none": {}, "span": {2: 1, 3: 1, 4: 1}, "interleaved": {3: 1, 4: 2, 5: 1}}


def plan_of(config: ModelConfig, name: str, mapped: bool) -> SharingPlan:
    leaders = PLANS[name]
    heads = [(head * 2 + 1) % config.n_heads for head in range(config.n_heads)]
    return SharingPlan.following(6, leaders, dict.fromkeys(leaders, heads) if mapped else {})


def pair(config: ModelConfig, plan: SharingPlan, library: ctypes.CDLL) -> tuple[TorchRunner, NativeRunner]:
    """The reference in fp32, with every product's input rounded to bf16 as the C++ step rounds it; and the C++ step."""
    reference, model = build_model(config, plan, "reference"), build_model(config, plan)
    for name, parameter in (*reference.named_parameters(), *model.named_parameters()):
        calm = 0.25 if name.endswith(("wo.weight", "w2.weight")) else 1.0  # or rounding noise doubles at every layer
        parameter.data = (parameter.data * calm).bfloat16().to(parameter.dtype)
    for module in reference.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda _, inputs: inputs[0].bfloat16().float())
    reference.norm.register_forward_hook(lambda *args: args[-1].bfloat16().float())  # what the head multiplies
    return TorchRunner(reference), NativeRunner(model, library, n_threads=2)


def caches(model: Transformer, *, batch: int = 1, length: int, **options: Any) -> list[StaticCache]:
    """Two, for the reference and for the C++ step."""
    config, plan = model.config, model.plan
    return [StaticCache.allocate(config, plan, batch=batch, max_seq_len=length, **options) for _ in range(2)]


def assert_near(found: Tensor, expected: Tensor, bound: float = 1e-2) -> None:
    """A sum in another order puts a number now and then on the other side of a rounding to bf16, eight bits wide."""
    assert (found - expected).norm() / expected.norm() < bound


@pytest.mark.parametrize("mapped", [False, True], ids=["identity", "head maps"])
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("shape", SHAPES)
def test_prefill_decode_and_ragged_batches(shape: str, plan: str, mapped: bool, library: ctypes.CDLL) -> None:
    """Prompts longer than a chunk, in rows of a batch; then steps in which every row has a position of its own."""
    config = SHAPES[shape]
    reference, native = pair(config, plan_of(config, plan, mapped), library)
    tokens, lengths = random_tokens(config, 3, 100), (70, 1, 17)
    expected_cache, cache = caches(reference.model, batch=3, length=110)
    for row, length in enumerate(lengths):
        rows, prompt = slice(row, row + 1), tokens[row : row + 1, :length]
        expected = reference.prefill(prompt, 0, expected_cache.view(rows=rows))
        assert_near(native.prefill(prompt, 0, cache.view(rows=rows)), expected)
    positions = torch.tensor(lengths)
    for _ in range(20):
        fed, in_use = tokens[range(3), positions], int(positions.max()) + 1
        expected = reference.decode(fed, positions, expected_cache, in_use)
        assert_near(native.decode(fed, positions, cache, in_use), expected)
        positions = positions + 1
    assert_near(cache.values, expected_cache.values)
    assert_near(cache.keys, expected_cache.keys)


EVERY_LOGIT = {name: (family.in_miniature(), SharingPlan.parse("1", 2), 2) for name, family in FAMILIES.items()}
EVERY_LOGIT |= {
    f"{n_threads} threads, window {window}": (
        replace(SHAPES["gqa"], sliding_window=window), plan_of(SHAPES["gqa"], "span", True), n_threads
    )
    for n_threads, window in ((1, None), (3, None), (2, 1), (2, 24))
}  # fmt: skip


@pytest.mark.parametrize("case", EVERY_LOGIT)
def test_every_logit_of_a_prompt_and_of_steps(case: str, library: ctypes.CDLL) -> None:
    """With each family's heads, RoPE and window; with other numbers of threads and other windows."""
    config, plan, n_threads = EVERY_LOGIT[case]
    reference, native = pair(config, plan, library)
    native.n_threads = n_threads
    tokens = random_tokens(config, 1, 90)
    expected_cache, cache = caches(reference.model, length=90)
    expected = torch.cat(list(reference.all_logits(tokens, 0, expected_cache)))
    found = list(native.all_logits(tokens[:, :80], 0, cache))
    found += [native.decode(tokens[:, at], torch.tensor([at]), cache, at + 1) for at in range(80, 90)]
    assert_near(torch.cat(found), expected)


def test_the_bound_would_see_one_token_too_few(library: ctypes.CDLL) -> None:
    reference, native = pair(SHAPES["gqa"], SharingPlan.none(6), library)
    tokens = random_tokens(native.model.config, 1, 20)
    expected_cache, cache = caches(reference.model, length=20)
    expected = reference.prefill(tokens, 0, expected_cache)
    with pytest.raises(AssertionError):
        assert_near(native.prefill(tokens[:, 1:], 0, cache), expected, bound=0.1)


@pytest.mark.parametrize(
    ("shape", "window", "weights"),
    [("gqa", None, None), ("gqa", 290, None), ("one kv head", None, "int8"), ("mha", None, "int4")],
)
def test_a_token_gets_the_same_bits_in_any_company(
    shape: str, window: int | None, weights: Format | None, library: ctypes.CDLL
) -> None:
    """One token at a time, a few, a chunk, beside other rows, by one thread or two: or a near tie between two
    tokens would go another way after a cached beginning, with guesses, or in a batch."""
    config = replace(SHAPES[shape], sliding_window=window)
    with torch.device("meta"):
        model = Transformer(config, plan_of(config, "interleaved", True))
    load_weights(model, random_checkpoint(config), device="cpu", dtype=torch.bfloat16, quantize=weights)
    native, ids = NativeRunner(model, library, n_threads=1), random_tokens(config, 1, 600)
    dtype = {None: torch.bfloat16, "int8": torch.float32, "int4": torch.float8_e4m3fn}[weights]
    text, other = (
        StaticCache.allocate(config, model.plan, batch=batch, max_seq_len=600, dtype=dtype) for batch in (1, 9)
    )
    expected = torch.cat(list(native.all_logits(ids, 0, text)))
    native.n_threads = 2
    starts = [522 - row * 34 for row in range(9)]  # in each of three parts, and at their ends
    for row, start in enumerate(starts):
        found = [native.prefill(ids[:, :start], 0, other.view(rows=slice(row, row + 1)))]
        found += native.all_logits(ids[:, start : start + row], start, other.view(rows=slice(row, row + 1)))
        assert torch.equal(torch.cat(found), expected[start - 1 : start + row])
    positions = torch.tensor(starts) + torch.arange(9)
    for n_rows in (9, 7, 3, 1):
        for _ in range(4):
            fed, at = ids[0, positions[:n_rows]], positions[:n_rows]
            found = native.decode(fed, at, other.view(rows=slice(n_rows)), int(at.max()) + 1)
            assert torch.equal(found, expected[at])
            positions[:n_rows] += 1


@pytest.mark.parametrize(
    ("window", "dtype"),
    [(1, torch.float32), (24, torch.float32), (24, torch.bfloat16), (24, torch.float8_e4m3fn)],
)
def test_a_ring_gives_the_logits_of_a_full_cache(window: int, dtype: torch.dtype, library: ctypes.CDLL) -> None:
    """Chunks that cross the ring's end, then ragged steps: the same as from a cache that keeps every token."""
    config, plan = replace(SHAPES["gqa"], sliding_window=window), plan_of(SHAPES["gqa"], "interleaved", True)
    model = build_model(config, plan)
    native, ids, slots = NativeRunner(model, library, n_threads=2), random_tokens(config, 2, 300), window + SLACK
    ring, whole = (
        StaticCache.allocate(config, plan, batch=2, max_seq_len=300, dtype=dtype, ring=ring) for ring in (True, False)
    )
    assert (ring.slots, whole.slots) == (slots, 300)
    lengths = (2 * slots + 30, slots - 3)
    for row, length in enumerate(lengths):
        rows, prompt = slice(row, row + 1), ids[row : row + 1, :length]
        found, expected = (native.prefill(prompt, 0, cache.view(rows=rows)) for cache in (ring, whole))
        assert torch.equal(found, expected)
    positions = torch.tensor(lengths)
    for _ in range(6):
        fed, in_use = ids[range(2), positions], int(positions.max()) + 1
        assert torch.equal(*(native.decode(fed, positions, cache, in_use) for cache in (ring, whole)))
        positions = positions + 1


@pytest.mark.parametrize("plan", ["none", "interleaved"])
def test_chunks_no_longer_than_their_weights_have_room(
    plan: str, library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = SHAPES["gqa"]
    reference, native = pair(config, plan_of(config, plan, True), library)
    n_spans = {"none": 0, "interleaved": 2}[plan]
    monkeypatch.setattr("minisa.runners.native.runner.SCRATCH", 100 * 4 * config.n_heads * n_spans * 20)
    ids = random_tokens(config, 1, 150)
    expected_cache, cache = caches(reference.model, length=150)
    chunks = list(native.all_logits(ids, 0, cache))
    sizes = [64, 64, 22] if plan == "none" else [31, 21, 17, 15, 13, 12, 11, 10, 10, 9, 1]
    assert [len(chunk) for chunk in chunks] == sizes
    assert_near(torch.cat(chunks), torch.cat(list(reference.all_logits(ids, 0, expected_cache))))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_narrow_caches_one_after_the_other(dtype: torch.dtype, library: ctypes.CDLL) -> None:
    """The tables follow the cache they are given: a second one, then the first again, each with its own text."""
    config, plan = SHAPES["gqa"], plan_of(SHAPES["gqa"], "span", True)
    reference, native = pair(config, plan, library)
    tokens, last = random_tokens(config, 2, 90), torch.tensor([90])
    pairs = [caches(native.model, length=length, dtype=dtype) for length in (91, 120)]
    for row, (cache, _) in enumerate(pairs):
        native.prefill(tokens[row : row + 1], 0, cache)
    for row, (cache, expected_cache) in enumerate(pairs):
        reference.prefill(tokens[row : row + 1], 0, expected_cache)
        expected = reference.decode(torch.tensor([7]), last, expected_cache, 91)
        assert_near(native.decode(torch.tensor([7]), last, cache, 91), expected, bound=0.02)


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e3])
def test_an_fp8_cache_rounds_as_torch_does(scale: float, library: ctypes.CDLL) -> None:
    """To the bit, tiny and too large numbers too; of the first layer, which no attention has been before."""
    config, plan = SHAPES["gqa"], plan_of(SHAPES["gqa"], "span", True)
    model = build_model(config, plan)
    model.layers[0].attention.wv.weight *= scale  # type: ignore[operator, union-attr]
    native, tokens = NativeRunner(model, library, n_threads=2), random_tokens(config, 1, 90)
    wide, narrow = (
        StaticCache.allocate(config, plan, max_seq_len=90, dtype=dtype)
        for dtype in (torch.float32, torch.float8_e4m3fn)
    )
    for cache in (wide, narrow):
        native.prefill(tokens, 0, cache)
    for kept, exact in ((narrow.values[0], wide.values[0]), (narrow.keys[0], wide.keys[0])):
        assert torch.equal(kept.view(torch.uint8), to_dtype(exact, torch.float8_e4m3fn).view(torch.uint8))


def test_what_lies_outside_is_refused_before_it_is_touched(library: ctypes.CDLL) -> None:
    _, native = pair(SHAPES["gqa"], plan_of(SHAPES["gqa"], "none", False), library)
    cache, _ = caches(native.model, length=8)
    one = torch.tensor([1])
    for token, position in ((300, 0), (-1, 0), (0, 8), (0, -1)):
        with pytest.raises(IndexError, match="outside"):
            native.decode(one * token, one * position, cache, 8)
    with pytest.raises(MinisaError, match="9 tokens do not fit a cache of 8"):
        native.decode(one, one, cache, 9)
    assert not cache.values.any()


def test_weights_move_out_of_the_model(library: ctypes.CDLL) -> None:
    config, plan = SHAPES["mha"], plan_of(SHAPES["mha"], "span", False)
    _, native = pair(config, plan, library)
    assert not any(p.ndim == 2 for p in native.model.parameters())
    padding = 32 * max(config.dim, config.hidden_dim) * 2 * (4 * config.n_layers + 2)  # to whole panels
    assert 0 <= native.weight_bytes - 2 * parameter_count(config, plan) < padding


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_what_comes_between_products_is_one_thread_s() -> None:
    """PyTorch's others would spin on the cores of the step's. Here they have not begun yet, and would be new to the
    process."""
    subprocess.run([sys.executable, "-c", ONE_THREAD], cwd=Path(__file__).parents[1], check=True)


ONE_THREAD = """
import os, torch
torch.set_num_threads(1)
from minisa.cache import StaticCache
from minisa.runners.native.build import open_library
from minisa.runners.native.runner import NativeRunner
from minisa.generation.sampling import Chooser, Sampling
from tests.models import PLANS, build_model
from tests.tiny import tiny_config

config = tiny_config(n_layers=6, n_heads=2, n_kv_heads=1, head_dim=64, hidden_dim=64, vocab_size=40_000)
runner = NativeRunner(build_model(config, PLANS["none"]), open_library(), n_threads=1)
cache = StaticCache.allocate(config, PLANS["none"], batch=6, max_seq_len=64)
sampling = Sampling(temperature=1.0, top_p=0.9, repetition_penalty=1.1)
torch.set_num_threads(2)
before = os.listdir("/proc/self/task")
with torch.inference_mode():
    tokens, positions = torch.arange(30)[None], torch.arange(30, 36)
    choose = Chooser.idle(sampling, 6, 64, 40_000, torch.device("cpu"))
    choose.rows(slice(1)).begin(list(range(30)), 0)
    runner.prefill(tokens, 0, cache)
    runner.verify(tokens[:, :7], 30, cache)
    choose(runner.decode(tokens[0, :6], positions, cache, 36), positions)
assert os.listdir("/proc/self/task") == before, "PyTorch's threads have begun"
torch.rand(1_000_000).cos()
assert os.listdir("/proc/self/task") != before, "they would not be seen"
"""
