"""Weights in the order that matmul.h reads them: panels of 32 rows, a lane for each row.

Rows are padded with zeros to whole panels; all functions return uint8 [bytes]. The formats, for a panel of a matrix
[rows, cols]:

    bf16   [cols / 2][32 rows][2]
    int8   bytes [cols / 4][32 rows][4], then fp16 scales [cols / 32][32 rows]; weight = scale · (byte - 128)
    int4   bytes [cols / 32][4][32 rows][4], low nibbles the first 16 of a block's columns, then, in fp16,
           [cols / 32][scale, minimum][32 rows]; weight = scale · nibble + minimum
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

PANEL, LANES = 32, 16


def pack_bf16(weight: Tensor) -> Tensor:
    """weight [rows, cols], rounded to bf16."""
    panels = _whole_panels(weight.bfloat16()).unflatten(1, (-1, 2)).unflatten(0, (-1, PANEL))  # [P, 32, cols/2, 2]
    return _bytes(panels.transpose(1, 2)).flatten()


def pack_int8(quants: Tensor, scales: Tensor) -> Tensor:
    """quants int8 [rows, cols]; scales fp16 [rows, cols / 32]."""
    biased = _whole_panels(quants).view(torch.uint8) ^ 0x80  # 0..255: the processor multiplies unsigned by signed bytes
    panels = biased.view(-1, PANEL, quants.shape[1] // 4, 4).transpose(1, 2)  # [P, cols/4, 32, 4]
    return _join(panels, _by_panel(scales))


def pack_int4(nibbles: Tensor, scales: Tensor, minimums: Tensor) -> Tensor:
    """nibbles int8 0..15 [rows, cols]; scales and minimums fp16 [rows, cols / 32]."""
    halves = (-1, PANEL, scales.shape[1], 2, 4, 4)
    blocks = _whole_panels(nibbles).view(torch.uint8).view(halves)  # [P, 32, blocks, half, 4, 4]
    pairs = blocks[:, :, :, 0] | (blocks[:, :, :, 1] << 4)  # [P, 32, blocks, 4, 4]
    both = torch.stack((_by_panel(scales), _by_panel(minimums)), dim=2)  # [P, blocks, 2, 32]
    return _join(pairs.permute(0, 2, 3, 1, 4), both)


def interleave(gate: Tensor, up: Tensor) -> Tensor:
    """16 rows of gate, 16 of up, and so on, so that a panel holds both sides of SwiGLU's products."""
    return torch.stack((gate.view(-1, LANES, gate.shape[1]), up.view(-1, LANES, up.shape[1])), dim=1).flatten(0, 2)


def _whole_panels(matrix: Tensor) -> Tensor:
    missing = -matrix.shape[0] % PANEL
    return F.pad(matrix, (0, 0, 0, missing)) if missing else matrix


def _by_panel(scales: Tensor) -> Tensor:
    return _whole_panels(scales.half()).view(-1, PANEL, scales.shape[1]).transpose(1, 2)  # [P, blocks, 32]


def _join(panels: Tensor, scales: Tensor) -> Tensor:
    return torch.cat((_bytes(panels), _bytes(scales)), dim=1).flatten()


def _bytes(panels: Tensor) -> Tensor:
    return panels.contiguous().view(torch.uint8).flatten(1)
