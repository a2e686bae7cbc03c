"""The Triton kernels, attention against the reference and products against the matrix dequantized: on a GPU where there
is one, else in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason='needs pip install "minisa[test]", on Linux')

from minisa.attention import HeadMap
from minisa.benchmark.selfcheck import BOUNDS, attention_errors, attention_tensors, product_error
from minisa.quantize import Format, quantize
from minisa.runners.kernels.decode_attention import BLOCK, KERNELS
from minisa.runners.kernels.quantized_product import multiply_row, quantized_product
from tests.engines import DEVICE

LENGTHS = (1, BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK + 7)
HEAD_MAP = HeadMap.of([5, 0, 3, 3, 1, 2], 2, DEVICE)


@pytest.mark.parametrize("mapped", [False, True], ids=["identity", "head map"])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(("n_heads", "n_kv_heads", "head_dim"), [(9, 3, 64), (4, 4, 96), (8, 1, 128), (20, 1, 64)])
def test_lengths_and_groups(n_heads: int, n_kv_heads: int, head_dim: int, length: int, mapped: bool) -> None:
    tensors = attention_tensors(1, n_heads, n_kv_heads, head_dim, torch.float32, DEVICE)
    heads_of = [(head * 5 + 2) % n_heads for head in range(n_heads)]
    head_map = HeadMap.of(heads_of, n_kv_heads, DEVICE) if mapped else None
    errors = attention_errors(*tensors, torch.tensor([length - 1], device=DEVICE), head_map, None)
    assert max(errors) < BOUNDS[torch.float32]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("window", [None, 1, BLOCK + 3])
def test_dtypes_ragged_rows_and_windows(dtype: torch.dtype, window: int | None) -> None:
    tensors = attention_tensors(5, 6, 2, 64, dtype, DEVICE)
    errors = attention_errors(*tensors, torch.tensor(LENGTHS, device=DEVICE) - 1, HEAD_MAP, window)
    assert max(errors) < BOUNDS[dtype]


@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.float8_e4m3fn])
def test_a_ring_gives_what_slots_in_order_give(kv_dtype: torch.dtype) -> None:
    """Rows not yet round, going round and long past it: the same as from slots in the order of their positions."""
    window, slots, length = BLOCK + 3, BLOCK + 20, 3 * BLOCK
    q, *straight = attention_tensors(4, 6, 2, 64, torch.float32, DEVICE, kv_dtype, length)
    positions = torch.tensor([5, slots - 1, slots + 9, length - 1], device=DEVICE)
    rings = [torch.zeros_like(kv[:, :, :slots]) for kv in straight]
    for row, position in enumerate(positions.tolist()):
        for ring, kv in zip(rings, straight, strict=True):
            for p in range(position + 1):
                ring[row, :, p % slots] = kv[row, :, p]
    assert max(attention_errors(q, *rings, positions, HEAD_MAP, window, ring=True)) < BOUNDS[torch.float32]
    found = []
    for k, v, v_own in (rings, straight):
        visible = KERNELS.visible(positions[:, None], k.shape[2], window, k.shape[2] == slots)
        mixed, shared = KERNELS.lead(q, k, v, visible)
        found.append(torch.cat((mixed, KERNELS.follow(shared, v_own, HEAD_MAP))))
    assert (found[0] - found[1]).norm() / found[1].norm() < BOUNDS[torch.float32]


@pytest.mark.parametrize("mapped", [False, True], ids=["identity", "head map"])
@pytest.mark.parametrize("window", [None, BLOCK + 3])
def test_several_queries_of_a_row(window: int | None, mapped: bool) -> None:
    """Guesses ahead: each sees what a query of its own row would."""
    _, *kv = attention_tensors(2, 6, 2, 64, torch.float32, DEVICE)
    q = torch.randn(2, 6, 5, 64, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    positions = torch.tensor([[BLOCK - 2], [2 * BLOCK]], device=DEVICE) + torch.arange(5, device=DEVICE)
    assert max(attention_errors(q, *kv, positions, HEAD_MAP if mapped else None, window)) < BOUNDS[torch.float32]


def test_slots_beyond_the_position_are_never_seen() -> None:
    """Whatever an earlier text left there, NaN included."""
    q, k, v, v_own = attention_tensors(2, 6, 2, 64, torch.float32, DEVICE)
    positions = torch.tensor([10, 2 * BLOCK], device=DEVICE)
    clean, shared = KERNELS.lead(q, k, v, KERNELS.visible(positions[:, None], k.shape[2], None))
    followed = KERNELS.follow(shared, v_own, None)
    for row, position in enumerate(positions.tolist()):
        for kv in (k, v, v_own):
            kv[row, :, position + 1 :] = float("nan")
    again, shared = KERNELS.lead(q, k, v, KERNELS.visible(positions[:, None], k.shape[2], None))
    assert torch.equal(again, clean)
    assert torch.equal(KERNELS.follow(shared, v_own, None), followed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_fp8_cache(dtype: torch.dtype) -> None:
    """The same as a cache of the numbers that were rounded to."""
    q, k, v, v_own = attention_tensors(2, 6, 2, 64, dtype, DEVICE, torch.float8_e4m3fn)
    visible = KERNELS.visible(torch.tensor([[3], [200]], device=DEVICE), k.shape[2], None)
    narrow, narrow_shared = KERNELS.lead(q, k, v, visible)
    wide, wide_shared = KERNELS.lead(q, k.to(dtype), v.to(dtype), visible)
    assert torch.equal(narrow, wide)
    assert torch.equal(KERNELS.follow(narrow_shared, v_own, None), KERNELS.follow(wide_shared, v_own.to(dtype), None))


def test_every_fp8_number_is_read_as_torch_reads_it() -> None:
    """One slot, which all attention goes to: the output is its value."""
    numbers = torch.arange(256, device=DEVICE)
    numbers = torch.where((numbers & 0x7F) == 0x7F, 0, numbers).byte().view(torch.float8_e4m3fn)  # all but the NaNs
    v = numbers.view(1, 2, 1, 128)
    q = torch.zeros(1, 2, 1, 128, device=DEVICE)
    first = torch.zeros(1, 1, dtype=torch.int64, device=DEVICE)
    mixed, _ = KERNELS.lead(q, torch.zeros_like(numbers).view_as(v), v, KERNELS.visible(first, 1, None))
    assert torch.equal(mixed, v.float())


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize(("n", "k"), [(64, 256), (33, 32), (70, 416), (5, 2048)])
@pytest.mark.parametrize("format", ["int8", "int4"])
def test_a_product_equals_the_dequantized_one(format: Format, n: int, k: int, dtype: torch.dtype) -> None:
    assert product_error(format, n, k, dtype, DEVICE) < BOUNDS[dtype]


@pytest.mark.parametrize("dtype", BOUNDS)
def test_a_product_s_shape_and_dtype(dtype: torch.dtype) -> None:
    blocks = quantize(torch.randn(7, 64).to(DEVICE), "int8")
    found = quantized_product(torch.randn(1, 1, 64).to(DEVICE, dtype), blocks.quants, blocks.scales, None)
    assert (found.shape, found.dtype) == ((1, 1, 7), dtype)


def test_packed_blocks_are_the_same_in_half_the_bytes() -> None:
    blocks = quantize(torch.randn(8, 96), "int4")
    packed = blocks.packed()
    assert packed.quants.nbytes * 2 == blocks.quants.nbytes
    assert torch.equal(packed.dequantize(), blocks.dequantize())


def test_the_compiler_sees_a_product_as_one_operation() -> None:
    """With a shape it can reason about, so that a layer compiles whole around it."""
    blocks = quantize(torch.randn(64, 64), "int8")
    torch.library.opcheck(multiply_row, (torch.randn(16, 2, 2), blocks.quants, blocks.scales, None))
