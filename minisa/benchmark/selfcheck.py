"""Whether this machine computes what the reference computes: kernels, compiled steps, a real model.

Errors are relative, ‖found - expected‖ / ‖expected‖; expected is computed in float64 for a kernel, by eager PyTorch for
a step.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from minisa.attention import REFERENCE, HeadMap, visible_slots
from minisa.benchmark.synthetic import random_llm
from minisa.config import ModelConfig
from minisa.engine import LLM, load
from minisa.errors import MinisaError
from minisa.generation.runner import Runner
from minisa.generation.sampling import Chooser
from minisa.generation.speculate import MAX_GUESSES
from minisa.models.registry import DEFAULT_MODEL, find, local_path
from minisa.quantize import QUANTIZATIONS, quantize
from minisa.runners.choice import find_backend
from minisa.sharing import SharingPlan

SMALL = ModelConfig(
    dim=512, n_layers=4, n_heads=8, n_kv_heads=2, head_dim=64, hidden_dim=1024, vocab_size=4096, max_seq_len=2048
)
SMALL_PLAN = SharingPlan.following(4, {2: 1, 3: 1}, {3: [7, 0, 1, 2, 3, 3, 3, 6]})
LENGTHS = (1, 63, 64, 65, 700)  # of contexts
SLOTS = 768  # of a cache that holds them all
PROMPTS, STEPS = (1, 17, 64, 300), 8  # tokens of each row's prompt; steps after them
# What rounding once on the way and once at the end costs. Triton's interpreter makes a bf16 of fp32 by cutting bits
# off, which is up to two units of 2^-9 in place of one, and always downwards.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BOUNDS = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3 if INTERPRETED else 3e-3}


@dataclass(frozen=True, slots=True)
class Outcome:
    """One check: passed is None where it was left out."""

    name: str
    passed: bool | None
    detail: str
    seconds: float


class LeftOutError(Exception):
    """Why a check does not apply to this machine."""


def run_checks(device: torch.device) -> Iterator[Outcome]:
    """Every check on a device, one after the other, as each is done."""
    for name, check in CHECKS.items():
        began = time.perf_counter()
        passed: bool | None
        try:
            passed, detail = check(device)
        except LeftOutError as reason:
            passed, detail = None, str(reason)
        except Exception as error:  # the next checks may tell why
            passed, detail = False, f"{type(error).__name__}: {error}"
        yield Outcome(name, passed, " ".join(detail.split()), time.perf_counter() - began)


def check_attention(device: torch.device) -> tuple[bool, str]:
    """The kernels of kernels/decode_attention.py: head sizes, groups, lengths, dtypes, an fp8 cache, windows, rings."""
    _need_triton(device)
    worst: dict[torch.dtype, float] = {}
    shapes = [(9, 3, 64), (4, 4, 96), (8, 2, 128), (20, 1, 64)]
    windows = ((None, SLOTS), (66, SLOTS), (66, 130))
    for (n_heads, n_kv_heads, head_dim), dtype, (window, slots) in product(shapes, BOUNDS, windows):
        head_map = HeadMap.of([(head * 5 + 2) % n_heads for head in range(n_heads)], n_kv_heads, device)
        for kv_dtype in (dtype, torch.float8_e4m3fn):
            tensors = attention_tensors(len(LENGTHS), n_heads, n_kv_heads, head_dim, dtype, device, kv_dtype, slots)
            positions = torch.tensor(LENGTHS, device=device) - 1
            errors = attention_errors(*tensors, positions, head_map, window, ring=slots < max(LENGTHS))
            worst[dtype] = max(worst.get(dtype, 0.0), *errors)
    return _judge(worst)


def check_products(device: torch.device) -> tuple[bool, str]:
    """The kernel of kernels/quantized_product.py: int8 and int4."""
    _need_triton(device)
    worst: dict[torch.dtype, float] = {}
    for format, dtype, (n, k) in product(QUANTIZATIONS, BOUNDS, ((576, 1536), (33, 96))):
        error = product_error(format, n, k, dtype, device)
        worst[dtype] = max(worst.get(dtype, 0.0), error)
    return _judge(worst)


def check_steps(device: torch.device) -> tuple[bool, str]:
    """What a device runs by default, with every kind of weights: graphs on a GPU, the C++ step on a CPU.

    Its logits against those of eager PyTorch without kernels, after steps, a prompt in pieces and guesses; and the
    tokens of its whole steps against those of its logits.
    """
    dtype = torch.float32 if device.type == "cuda" else torch.bfloat16  # fp32 shows slips that bf16 would hide
    details = []
    for quantized in (None, *QUANTIZATIONS):
        eager, llm = (
            random_llm(
                SMALL, SMALL_PLAN, device=device, dtype=dtype, max_seq_len=512, max_batch=len(PROMPTS),
                quantize=quantized, backend=backend, compile=backend is None,
            )
            for backend in ("torch", None)
        )  # fmt: skip
        expected = _logits_of_steps(eager, eager.runner)
        began = time.perf_counter()
        runner = llm.runner
        if device.type == "cpu" and runner.name != "C++ step":
            raise LeftOutError("there is no C++ step here: it needs g++")
        error = _relative(_logits_of_steps(llm, runner), expected)
        error = max(error, _relative(_logits_of_pieces(llm, runner), _logits_of_pieces(eager, eager.runner)))
        details.append(f"{quantized or 'as they are'} {error:.1e} in {time.perf_counter() - began:.0f} s")
        # The C++ step rounds activations to bf16, or to eight bits: that is its format, and more than a slip of order.
        bound = 1e-4 if device.type == "cuda" else 0.05 if quantized else 0.03
        if not error < bound:
            return False, f"{runner.name}, weights {details[-1]}: expected less than {bound}"
        if not torch.equal(*(_tokens_of_steps(llm, runner, whole=whole) for whole in (True, False))):
            return False, f"{runner.name}, weights {details[-1]}: its whole steps choose other tokens"
    return True, f"{runner.name}, weights {', '.join(details)}"


def check_real_model(device: torch.device) -> tuple[bool, str]:
    """The default model, if it is here: greedy, plain and shared, as chat.py runs it."""
    if local_path(find(DEFAULT_MODEL)) is None:
        raise LeftOutError(f"{DEFAULT_MODEL} is not here: python -m minisa pull {DEFAULT_MODEL}")
    answers = {}
    ways: dict[str, dict[str, Any]] = {"plain": {}, "shared": {"sa": "default"}, "fp8 cache": {"kv_dtype": "fp8"}}
    for name, options in ways.items():
        llm = load(DEFAULT_MODEL, device=str(device), max_seq_len=512, compile=True, **options)
        question = [{"role": "user", "content": "What is the capital of France?"}]
        chunks = list(llm.chat(question, max_new_tokens=40))
        stats = chunks[-1].stats
        assert stats is not None
        answers[name] = ("".join(chunk.text for chunk in chunks), stats.tokens_per_second)
    speeds = ", ".join(f"{name} {speed:.0f} tokens/s" for name, (_, speed) in answers.items())
    wrong = [name for name, (text, _) in answers.items() if "Paris" not in text]
    return not wrong, f"the capital of France is not Paris: {wrong}" if wrong else speeds


CHECKS: dict[str, Callable[[torch.device], tuple[bool, str]]] = {
    "attention kernels": check_attention,
    "quantized products": check_products,
    "compiled steps": check_steps,
    "a real model": check_real_model,
}


def attention_tensors(
    batch: int, n_heads: int, n_kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device,
    kv_dtype: torch.dtype | None = None, slots: int = SLOTS,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Noise: q [B, H, 1, D]; a leader's keys and values and a follower's values [B, Hkv, S, D], slices of a larger
    memory, as they are in the model."""
    generator = torch.Generator().manual_seed(n_heads * 1000 + head_dim)
    q = torch.randn(batch, n_heads, 1, head_dim, generator=generator).to(device, dtype)
    memory = torch.randn(3, batch + 1, n_kv_heads, slots, head_dim, generator=generator).to(device, kv_dtype or dtype)
    k, v, v_own = memory[:, :batch].unbind()
    return q, k, v, v_own


def attention_errors(
    q: Tensor, k: Tensor, v: Tensor, v_own: Tensor, positions: Tensor, head_map: HeadMap | None, window: int | None,
    ring: bool = False,
) -> tuple[float, float]:  # fmt: skip
    """Of a leader's output and of a follower's, by the kernels, for q [B, H, T, D] at positions [B, T], or [B]."""
    kernels, slots = find_backend("kernels", q.device), k.shape[2]
    positions = positions.view(len(q), -1)
    mixed, shared = kernels.lead(q, k, v, kernels.visible(positions, slots, window, ring))
    followed = kernels.follow(shared, v_own, head_map)
    q, k, v, v_own = (x.to(q.dtype).double() for x in (q, k, v, v_own))
    expected, weights = REFERENCE.lead(q, k, v, visible_slots(positions, slots, window, ring))
    return _relative(mixed, expected), _relative(followed, REFERENCE.follow(weights, v_own, head_map))


def product_error(format: str, n: int, k: int, dtype: torch.dtype, device: torch.device) -> float:
    """Of a row of noise [1, k] times a quantized matrix [n, k] of noise."""
    from minisa.runners.kernels.quantized_product import quantized_product

    generator = torch.Generator().manual_seed(n * k)
    blocks = quantize(torch.randn(n, k, generator=generator).to(device), format).packed()  # type: ignore[arg-type]
    x = torch.randn(1, k, generator=generator).to(device, dtype)
    found = quantized_product(x, blocks.quants, blocks.scales, blocks.minimums)
    return _relative(found, x.double() @ blocks.dequantize(torch.float64).T)


@torch.inference_mode()
def _logits_of_steps(llm: LLM, runner: Runner) -> Tensor:
    """Logits [STEPS · rows, vocab_size] of steps that are given their tokens."""
    tokens, positions = _prefilled(llm, runner)
    logits = [runner.decode(tokens + i, positions + i, llm.cache, max(PROMPTS) + i + 1) for i in range(STEPS)]
    return torch.cat(logits)


@torch.inference_mode()
def _logits_of_pieces(llm: LLM, runner: Runner) -> Tensor:
    """Logits [T, vocab_size] of a prompt that comes in two pieces, and of a token and as many guesses as are made."""
    ids, row = _noise(llm), llm.cache.view(rows=slice(1))
    first, second, guesses = ids[:, :100], ids[:, 100:290], ids[:, 290 : 291 + MAX_GUESSES]
    logits = [*runner.all_logits(first, 0, row), *runner.all_logits(second, 100, row)]
    return torch.cat([*logits, runner.verify(guesses, 290, row)])


@torch.inference_mode()
def _tokens_of_steps(llm: LLM, runner: Runner, *, whole: bool) -> Tensor:
    """The tokens [STEPS, rows] of greedy steps: whole ones, as generation takes them, or by their logits."""
    tokens, positions = _prefilled(llm, runner)
    step = runner.stepper(llm.cache, Chooser.greedy(len(PROMPTS)))
    chosen = []
    for i in range(STEPS):
        in_use = max(PROMPTS) + i + 1
        if whole:
            tokens, positions = step(tokens, positions, in_use)
        else:
            tokens, positions = runner.decode(tokens, positions, llm.cache, in_use).argmax(-1), positions + 1
        chosen.append(tokens)
    return torch.stack(chosen)


def _prefilled(llm: LLM, runner: Runner) -> tuple[Tensor, Tensor]:
    """PROMPTS fed, a row each; the tokens and positions to go on with."""
    for row, length in enumerate(PROMPTS):
        runner.prefill(_noise(llm)[:, :length], 0, llm.cache.view(rows=slice(row, row + 1)))
    return torch.ones(len(PROMPTS), dtype=torch.int64, device=llm.device), torch.tensor(PROMPTS, device=llm.device)


def _noise(llm: LLM) -> Tensor:
    """Token ids [1, the longest of PROMPTS]."""
    ids = torch.randint(llm.config.vocab_size, (1, max(PROMPTS)), generator=torch.Generator().manual_seed(0))
    return ids.to(llm.device)


def _judge(worst: dict[torch.dtype, float]) -> tuple[bool, str]:
    passed = all(error < BOUNDS[dtype] for dtype, error in worst.items())
    errors = ", ".join(f"{str(dtype).removeprefix('torch.')} {error:.1e}" for dtype, error in worst.items())
    return passed, f"largest error {errors}"


def _relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def _need_triton(device: torch.device) -> None:
    try:
        find_backend("kernels", device)
    except MinisaError:
        raise LeftOutError("no GPU here, or no Triton; with TRITON_INTERPRET=1 set they run on the CPU") from None
