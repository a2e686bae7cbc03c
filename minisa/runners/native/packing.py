"""Weights in the order that matmul.h reads them: panels of 32 rows, a lane for each row.

The formats, for a panel of a matrix [rows, cols]:

    bf16   [cols / 2][32 rows][2]
    int8   bytes [cols / 4][32 rows][4], then fp16 scales [cols / 32][32 rows]; weight = scale · (byte - 128)
    int4   bytes [cols / 32][4][32 rows][4], low nibbles the first 16 of a block's columns, then, in fp16,
           [cols / 32][scale, minimum][32 rows]; weight = scale · nibble + minimum
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

PANEL, LANES, BLOCK = 32, 16, 32
FORMATS = {"bf16": 0, "int8": 1, "int4": 2}  # as in tables.h


@dataclass(frozen=True, slots=True)
class Packed:
    """A matrix [rows, cols] in panels, as uint8. Rows are padded with zeros to whole panels."""

    data: Tensor
    format: str
    rows: int
    cols: int


def pack_bf16(weight: Tensor) -> Packed:
    """weight [rows, cols], rounded to bf16."""
    rows, cols = weight.shape
    panels = _whole_panels(weight.bfloat16()).view(-1, PANEL, cols // 2, 2).transpose(1, 2)  # [P, cols/2, 32, 2]
    return Packed(panels.contiguous().view(torch.uint8).flatten(), "bf16", rows, cols)


def pack_int8(quants: Tensor, scales: Tensor) -> Packed:
    """quants int8 [rows, cols]; scales fp16 [rows, cols / 32]."""
    rows, cols = quants.shape
    biased = _whole_panels(quants).view(torch.uint8) ^ 0x80  # 0..255: the processor multiplies unsigned by signed bytes
    panels = biased.view(-1, PANEL, cols // 4, 4).transpose(1, 2)  # [P, cols/4, 32, 4]
    return Packed(_join(panels, _by_panel(scales)), "int8", rows, cols)


def pack_int4(nibbles: Tensor, scales: Tensor, minimums: Tensor) -> Packed:
    """nibbles int8 0..15 [rows, cols]; scales and minimums fp16 [rows, cols / 32]."""
    rows, cols = nibbles.shape
    blocks = (
        _whole_panels(nibbles).view(torch.uint8).view(-1, PANEL, cols // BLOCK, 2, 4, 4)
    )  # [P, 32, blocks, half, 4, 4]
    pairs = blocks[:, :, :, 0] | (blocks[:, :, :, 1] << 4)  # [P, 32, blocks, 4, 4]
    both = torch.stack((_by_panel(scales), _by_panel(minimums)), dim=2)  # [P, blocks, 2, 32]
    return Packed(_join(pairs.permute(0, 2, 3, 1, 4), both), "int4", rows, cols)


def interleave(gate: Tensor, up: Tensor) -> Tensor:
    """16 rows of gate, 16 of up, and so on, so that a panel holds both sides of SwiGLU's products."""
    return torch.stack((gate.view(-1, LANES, gate.shape[1]), up.view(-1, LANES, up.shape[1])), dim=1).flatten(0, 2)


def _whole_panels(matrix: Tensor) -> Tensor:
    missing = -matrix.shape[0] % PANEL
    return F.pad(matrix, (0, 0, 0, missing)) if missing else matrix


def _by_panel(scales: Tensor) -> Tensor:
    return _whole_panels(scales.half()).view(-1, PANEL, scales.shape[1]).transpose(1, 2)  # [P, blocks, 32]


def _join(panels: Tensor, scales: Tensor) -> Tensor:
    parts = [part.contiguous().view(torch.uint8).flatten(1) for part in (panels, scales)]
    return torch.cat(parts, dim=1).flatten()
