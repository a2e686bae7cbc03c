"""The Triton product of a row with a quantized matrix, against the matrix dequantized."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason='needs pip install "minisa[test]", on Linux')

from minisa.benchmark.selfcheck import BOUNDS, product_error
from minisa.quantize import Format, quantize
from minisa.runners.kernels.quantized_product import multiply_row, quantized_product
from tests.engines import DEVICE


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize(("n", "k"), [(64, 256), (33, 32), (70, 416), (5, 2048)])
@pytest.mark.parametrize("format", ["int8", "int4"])
def test_equals_the_dequantized_product(format: Format, n: int, k: int, dtype: torch.dtype) -> None:
    assert product_error(format, n, k, dtype, DEVICE) < BOUNDS[dtype]


@pytest.mark.parametrize("dtype", BOUNDS)
def test_shapes_and_dtypes_come_back(dtype: torch.dtype) -> None:
    blocks = quantize(torch.randn(7, 64).to(DEVICE), "int8")
    found = quantized_product(torch.randn(1, 1, 64).to(DEVICE, dtype), blocks.quants, blocks.scales, None)
    assert (found.shape, found.dtype) == ((1, 1, 7), dtype)


def test_packed_blocks_are_the_same_in_half_the_bytes() -> None:
    blocks = quantize(torch.randn(8, 96), "int4")
    packed = blocks.packed()
    assert packed.quants.nbytes * 2 == blocks.quants.nbytes
    assert torch.equal(packed.dequantize(), blocks.dequantize())
    assert packed.packed() is packed
    eight_bits = quantize(torch.randn(8, 96), "int8")
    assert eight_bits.packed() is eight_bits


def test_the_compiler_sees_one_operation() -> None:
    """With a shape it can reason about, so that a layer compiles whole around it."""
    blocks = quantize(torch.randn(64, 64), "int8")
    torch.library.opcheck(multiply_row, (torch.randn(16, 2, 2), blocks.quants, blocks.scales, None))
