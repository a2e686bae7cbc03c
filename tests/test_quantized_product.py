"""The Triton product of few rows with a quantized matrix, against the matrix dequantized."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason='needs pip install "minisa[test]", on Linux')

from minisa.kernels.quantized_product import MOST_ROWS, quantized_product
from minisa.quantize import Format, quantize
from tests.test_kernels import BOUNDS, DEVICE


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("n_rows", [1, 2, 16, MOST_ROWS])
@pytest.mark.parametrize(("n", "k"), [(64, 256), (33, 32), (70, 416)])
@pytest.mark.parametrize("format", ["int8", "int4"])
def test_equals_the_dequantized_product(format: Format, n: int, k: int, n_rows: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(n * k + n_rows)
    blocks = quantize(torch.randn(n, k, generator=generator).to(DEVICE), format).packed()
    x = torch.randn(1, n_rows, k, generator=generator).to(DEVICE, dtype)
    expected = x.double() @ blocks.dequantize(torch.float64).T
    found = quantized_product(x, blocks.quants, blocks.scales, blocks.minimums)
    assert (found.shape, found.dtype) == ((1, n_rows, n), dtype)
    assert (found.double() - expected).norm() / expected.norm() < BOUNDS[dtype]


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
    torch.library.opcheck(quantized_product, (torch.randn(1, 1, 64), blocks.quants, blocks.scales, None))
