"""Quantized weights: the arithmetic, a GGUF file's own blocks kept as they are, and every way to run them."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from minisa.cache import StaticCache
from minisa.checkpoint import load_weights, open_checkpoint
from minisa.errors import MinisaError
from minisa.model import Transformer
from minisa.quantize import BLOCK, Blocks, check_quantization, quantize
from minisa.runners.choice import choose_runner, find_backend
from minisa.runners.native.runner import NativeRunner
from minisa.sharing import SharingPlan
from tests.models import DEVICE, in_one_go, random_tokens
from tests.tiny import random_weights, tiny_config, write_gguf, write_hf

CONFIG = tiny_config(n_layers=4, dim=64, n_heads=4, n_kv_heads=2, head_dim=32, hidden_dim=96, tie_embeddings=True)
PLAN = SharingPlan.parse("2", 4)


def read(path: Path, format: Any, dtype: torch.dtype = torch.float32, backend: str = "torch") -> Transformer:
    with torch.device("meta"):
        model = Transformer(CONFIG, PLAN, find_backend(backend, DEVICE))
    load_weights(model, open_checkpoint(path), device="cpu", dtype=dtype, quantize=format)
    return model.requires_grad_(False)


@pytest.mark.parametrize(("format", "steps"), [("int8", 127), ("int4", 15)])
def test_every_weight_is_within_half_a_step_of_its_block(format: Any, steps: int) -> None:
    weight = torch.randn(48, 128, generator=torch.Generator().manual_seed(0))
    weight[5, 32:64] = 0  # a block without a scale
    weight[6, :32] = 3.25
    restored = quantize(weight, format).dequantize()
    blocks, error = weight.unflatten(1, (-1, BLOCK)), (restored - weight).unflatten(1, (-1, BLOCK)).abs()
    span = blocks.abs().amax(-1) if format == "int8" else blocks.amax(-1) - blocks.amin(-1)
    rounding = blocks.abs().amax(-1) * 2**-10  # of scale and minimum to fp16
    assert (error.amax(-1) <= span / steps / 2 + 2 * rounding).all()
    assert torch.equal(restored[5, 32:64], torch.zeros(32))


def test_worked_example() -> None:
    """int8: scale 2, q = 1, 2, …; int4: scale 0.5 from minimum -1."""
    ones = torch.ones(1, 1)
    blocks = Blocks(torch.arange(32, dtype=torch.int8)[None], 2 * ones.half())
    assert blocks.dequantize().tolist() == [[2.0 * i for i in range(32)]]
    fours = Blocks(torch.arange(32, dtype=torch.int8)[None] % 16, 0.5 * ones.half(), -ones.half())
    assert fours.dequantize().tolist() == [[0.5 * (i % 16) - 1 for i in range(32)]]


@pytest.mark.parametrize(("type", "format"), [("Q8_0", "int8"), ("Q4_0", "int4"), ("Q4_1", "int4")])
def test_a_gguf_files_own_blocks_lose_nothing(type: str, format: Any, tmp_path: Path) -> None:
    """q and k rows put right included: the layers' matrices equal the dequantized file's to the bit."""
    write_gguf(tmp_path / "m.gguf", CONFIG, random_weights(CONFIG, 0), type=type)
    exact, quantized = read(tmp_path / "m.gguf", None), read(tmp_path / "m.gguf", format)
    compared = 0
    for name, weight in exact.state_dict().items():
        if name.startswith("layers.") and weight.ndim == 2:
            module = quantized.get_submodule(name.removesuffix(".weight"))
            assert torch.equal(module.weight, weight)
            compared += 1
    assert compared == 7 * 4 - 2  # the follower has no wq and no wk


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_quantized_modules_compute_with_the_dequantized_weights(format: Any, tmp_path: Path) -> None:
    write_hf(tmp_path, CONFIG, random_weights(CONFIG, 0))
    quantized, plain = read(tmp_path, format), read(tmp_path, None)
    for name, weight in plain.state_dict().items():
        if weight.ndim == 2:
            weight.copy_(quantized.get_submodule(name.removesuffix(".weight")).weight)
    tokens = random_tokens(CONFIG, 2, 20)
    with torch.inference_mode():
        assert torch.equal(in_one_go(quantized, tokens), in_one_go(plain, tokens))


def rounded_to_blocks(x: Tensor) -> Tensor:
    """What the C++ step makes of activations before it multiplies them with integer weights."""
    blocks = x.unflatten(-1, (-1, BLOCK))
    scales = blocks.abs().amax(-1, keepdim=True) / 127
    return ((blocks / scales.clamp_min(1e-30)).round() * scales).flatten(-2)


@pytest.mark.parametrize("extreme", [False, True], ids=["random", "extreme"])
@pytest.mark.parametrize("format", ["int8", "int4"])
def test_the_cpp_step_computes_with_the_blocks(
    format: Any, extreme: bool, tmp_path: Path, library: ctypes.CDLL
) -> None:
    """extreme: every integer is the largest there is or the smallest, and the sums the largest that can be."""
    weights = random_weights(CONFIG, 0)
    if extreme:
        for weight in weights.values():
            weight.fill_(1)[..., ::BLOCK] = -1
    write_hf(tmp_path, CONFIG, weights)
    reference, model = read(tmp_path, format), read(tmp_path, format)
    for name, module in reference.named_modules():
        if name.endswith(("wq", "wk", "wv", "wo", "w1", "w2", "w3")):
            module.register_forward_pre_hook(lambda _, inputs: rounded_to_blocks(inputs[0]))
    reference.norm.register_forward_hook(lambda *args: rounded_to_blocks(args[-1]))
    tokens, cache = random_tokens(CONFIG, 1, 40), StaticCache.allocate(CONFIG, PLAN, max_seq_len=40)
    native = NativeRunner(model, library, n_threads=2)
    with torch.inference_mode():
        expected = in_one_go(reference, tokens)[0]
    found = torch.cat([*native.all_logits(tokens[:, :30], 0, cache), native.prefill(tokens[:, 30:39], 30, cache)])
    last = native.decode(tokens[:, 39], torch.tensor([39]), cache, 40)
    for got, want in ((found[:30], expected[:30]), (found[30], expected[38]), (last[0], expected[39])):
        assert (got - want).norm() / want.norm() < 2e-2
    plain_bytes = sum(weight.nbytes for weight in read(tmp_path, format).state_dict().values())
    assert native.weight_bytes <= plain_bytes + 32 * 4 * CONFIG.dim * CONFIG.n_layers
    assert not any(buffer.numel() for name, buffer in native.model.named_buffers() if name.endswith("quants"))


@pytest.mark.parametrize("module", ["attention.wv", "feed_forward.w1"])
@pytest.mark.parametrize("format", ["int8", "int4"])
def test_a_damaged_scale_is_not_rounded_away(format: Any, module: str, tmp_path: Path, library: ctypes.CDLL) -> None:
    """Activations of eight bits have no NaN: their scale has it."""
    write_hf(tmp_path, CONFIG, random_weights(CONFIG, 0))
    model = read(tmp_path, format)
    model.get_submodule(f"layers.1.{module}").get_buffer("scales")[5] = float("nan")
    cache = StaticCache.allocate(CONFIG, PLAN, max_seq_len=40)
    assert NativeRunner(model, library).prefill(random_tokens(CONFIG, 1, 20), 0, cache).isnan().any()


def test_the_cpp_step_finds_int4_as_it_was_whatever_the_backend(tmp_path: Path, library: ctypes.CDLL) -> None:
    """What is packed into half the bytes for Triton would be read as half as many columns."""
    write_hf(tmp_path, CONFIG, random_weights(CONFIG, 0))
    tokens, logits = random_tokens(CONFIG, 1, 20), []
    for backend in ("torch", "kernels"):
        runner = choose_runner(read(tmp_path, "int4", torch.bfloat16, backend), True, library)
        assert runner.name == "C++ step"
        logits.append(runner.prefill(tokens, 0, StaticCache.allocate(CONFIG, PLAN, max_seq_len=20)))
    assert torch.equal(*logits)


def test_unknown_formats_and_unfit_widths_are_named(tmp_path: Path) -> None:
    with pytest.raises(MinisaError, match="--quantize 'int3' is not supported: expected int8 or int4"):
        check_quantization("int3")
    config = tiny_config(dim=48, n_heads=4, n_kv_heads=2, head_dim=12)
    write_hf(tmp_path, config, random_weights(config, 0))
    with torch.device("meta"):
        model = Transformer(config, SharingPlan.none(config.n_layers))
    with pytest.raises(MinisaError, match="48 columns, --quantize works on blocks of 32"):
        load_weights(model, open_checkpoint(tmp_path), device="cpu", dtype=torch.float32, quantize="int8")
