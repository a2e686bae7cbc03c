"""Weight-only quantization in blocks of 32 weights of a row, as GGUF has them.

    int8   weight = scale · q,             q in -127..127           (Q8_0)
    int4   weight = scale · q + minimum,   q in 0..15               (Q4_1; Q4_0 is the case minimum = -8 · scale)

Scales and minimums are fp16. A GGUF file's own blocks of these types are taken as they are, so nothing is lost. The
embedding, which is also the head where they are tied, is int8 in both: four bits there cost the most quality.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minisa.errors import MinisaError

BLOCK = 32
INT8_BYTES = 1 + 2 / BLOCK  # of a weight and its share of a scale
QUANTIZATIONS = ("int8", "int4")
Format = Literal["int8", "int4"]


@dataclass(frozen=True, slots=True)
class Blocks:
    """A quantized matrix [rows, cols].

    quants: int8 [rows, cols], -127..127 for int8 and 0..15 for int4; packed, int4's are uint8 [rows, cols / 2], the low
    nibbles the first 16 of each 32 columns. scales, minimums: fp16 [rows, cols / 32]; minimums None for int8.
    """

    quants: Tensor
    scales: Tensor
    minimums: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        return [part for part in (self.quants, self.scales, self.minimums) if part is not None]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[rows, cols]; computed in fp32 and then rounded to dtype."""
        quants = self.quants.unflatten(-1, (self.scales.shape[-1], -1))  # [rows, blocks, 32], or 16 if packed
        if quants.dtype == torch.uint8:
            quants = torch.cat((quants & 15, quants >> 4), dim=-1)
        weight = quants.float() * self.scales.float()[..., None]
        if self.minimums is not None:
            weight = weight + self.minimums.float()[..., None]
        return weight.flatten(-2).to(dtype)

    def packed(self) -> Blocks:
        """The same, int4 in half the bytes."""
        if self.minimums is None or self.quants.dtype == torch.uint8:
            return self
        low, high = self.quants.view(torch.uint8).unflatten(-1, (-1, 2, BLOCK // 2)).unbind(-2)
        return Blocks((low | high << 4).flatten(-2), self.scales, self.minimums)


def check_quantization(name: str | None) -> Format | None:
    """The name as a format. Raises MinisaError if it is none."""
    if name is None or name in QUANTIZATIONS:
        return name  # type: ignore[return-value]
    raise MinisaError(f"--quantize {name!r} is not supported: expected {' or '.join(QUANTIZATIONS)}")


def quantize(weight: Tensor, format: Format) -> Blocks:
    """weight [rows, cols], cols a multiple of 32, to the nearest values of each block's own scale."""
    blocks = weight.float().unflatten(-1, (-1, BLOCK))
    if format == "int8":
        scales = (blocks.abs().amax(-1) / 127).half()
        quants = (blocks * _inverse(scales)).round().clamp(-127, 127)
        return Blocks(quants.flatten(-2).to(torch.int8), scales)
    minimums, maximums = blocks.aminmax(dim=-1)
    scales, minimums = ((maximums - minimums) / 15).half(), minimums.half()
    quants = ((blocks - minimums.float()[..., None]) * _inverse(scales)).round().clamp(0, 15)
    return Blocks(quants.flatten(-2).to(torch.int8), scales, minimums)


def _inverse(scales: Tensor) -> Tensor:
    wide = scales.float()[..., None]
    return torch.where(wide > 0, 1 / wide, 0.0)  # a block of equal weights has no scale


def empty_blocks(shape: tuple[int, ...], format: Format, device: torch.device | str) -> Blocks:
    """Room for a quantized matrix of `shape`."""
    rows, cols = shape
    quants = torch.empty(rows, cols, dtype=torch.int8, device=device)
    scales = torch.empty(rows, cols // BLOCK, dtype=torch.float16, device=device)
    return Blocks(quants, scales, torch.empty_like(scales) if format == "int4" else None)


def replace_matrix(model: nn.Module, name: str, blocks: Blocks, dtype: torch.dtype) -> None:
    """Put a quantized module in the place of the one whose weight is called `name`."""
    path = name.removesuffix(".weight")
    kind = QuantizedEmbedding if path == "tok_embeddings" else QuantizedLinear
    model.set_submodule(path, kind(blocks, dtype))


class QuantizedLinear(nn.Module):
    """x @ weight.T with a quantized weight.

    multiply_row: a kernel that multiplies a single row by the blocks themselves, as the C++ step does. Without one the
    weight is dequantized at each call, which is right everywhere and fast only where it is compiled and rows are many.
    """

    quants: Tensor
    scales: Tensor
    minimums: Tensor | None

    def __init__(self, blocks: Blocks, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("quants", blocks.quants)
        self.register_buffer("scales", blocks.scales)
        self.register_buffer("minimums", blocks.minimums)
        self.dtype = dtype
        self.multiply_row: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor] | None = None

    @property
    def blocks(self) -> Blocks:
        return Blocks(self.quants, self.scales, self.minimums)

    @property
    def weight(self) -> Tensor:
        """[rows, cols] in the model's dtype."""
        return self.blocks.dequantize(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., cols] → [..., rows]."""
        if self.multiply_row is not None and x.shape[:-1].numel() == 1:
            return self.multiply_row(x, self.quants, self.scales, self.minimums)
        return F.linear(x, self.weight)


class QuantizedEmbedding(QuantizedLinear):
    """One dequantized row for each token."""

    def forward(self, tokens: Tensor) -> Tensor:
        assert self.minimums is None
        return Blocks(self.quants[tokens], self.scales[tokens]).dequantize(self.dtype)

    def head(self, hidden: Tensor) -> Tensor:
        """What a tied head computes."""
        return super().forward(hidden)
