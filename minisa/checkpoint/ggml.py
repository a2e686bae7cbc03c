"""ggml's tensor types: their sizes, and how their blocks become floats.

A quantized row is a sequence of blocks, each a few numbers shared by (most often) 32 weights and a few bits for each.
Q8_0, Q4_0 and Q4_1 are read here, as they are minisa's own int8 and int4; all others through the optional `gguf`
package. Layouts: ggml/src/ggml-common.h in https://github.com/ggml-org/llama.cpp
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from minisa.checkpoint.files import DataFile, FileTensor
from minisa.errors import MinisaError
from minisa.quantize import BLOCK, Blocks, Format, quantize


@dataclass(frozen=True, slots=True)
class GGMLType:
    """code: its number in files. Every `block` weights of a row take `nbytes` bytes."""

    code: int
    name: str
    block: int
    nbytes: int


TYPES = {
    code: GGMLType(code, name, block, nbytes)
    for code, name, block, nbytes in (
        (0, "F32", 1, 4), (1, "F16", 1, 2), (30, "BF16", 1, 2), (28, "F64", 1, 8),
        (24, "I8", 1, 1), (25, "I16", 1, 2), (26, "I32", 1, 4), (27, "I64", 1, 8),
        (2, "Q4_0", 32, 18), (3, "Q4_1", 32, 20), (6, "Q5_0", 32, 22), (7, "Q5_1", 32, 24),
        (8, "Q8_0", 32, 34), (9, "Q8_1", 32, 40),
        (10, "Q2_K", 256, 84), (11, "Q3_K", 256, 110), (12, "Q4_K", 256, 144), (13, "Q5_K", 256, 176),
        (14, "Q6_K", 256, 210), (15, "Q8_K", 256, 292),
        (16, "IQ2_XXS", 256, 66), (17, "IQ2_XS", 256, 74), (18, "IQ3_XXS", 256, 98), (19, "IQ1_S", 256, 50),
        (20, "IQ4_NL", 32, 18), (21, "IQ3_S", 256, 110), (22, "IQ2_S", 256, 82), (23, "IQ4_XS", 256, 136),
        (29, "IQ1_M", 256, 56), (34, "TQ1_0", 256, 54), (35, "TQ2_0", 256, 66), (39, "MXFP4", 32, 17),
    )
}  # fmt: skip
_OWN: dict[str, Format] = {"Q8_0": "int8", "Q4_0": "int4", "Q4_1": "int4"}
PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

Decoder = Callable[[Tensor], Tensor]  # uint8 [rows, blocks, nbytes] → fp32 [rows, blocks · block]


@dataclass(frozen=True, slots=True)
class QuantizedTensor:
    """A matrix of ggml blocks in a file, from byte `offset` on."""

    name: str
    shape: tuple[int, ...]
    type: GGMLType
    decode: Decoder
    file: DataFile
    offset: int

    def read_rows(self, start: int, stop: int) -> Tensor:
        return self.decode(self._read(start, stop))

    def read_blocks(self, start: int, stop: int, format: Format) -> Blocks:
        """The same rows quantized to `format`: the file's own blocks where they are that, else made anew."""
        if _OWN.get(self.type.name) != format:
            return quantize(self.read_rows(start, stop), format)
        return _split(self.type.name, self._read(start, stop))

    def _read(self, start: int, stop: int) -> Tensor:
        blocks = self.shape[1] // self.type.block  # of a row
        row_bytes = blocks * self.type.nbytes
        raw = self.file.read(self.offset + start * row_bytes, (stop - start) * row_bytes)
        return raw.view(stop - start, blocks, self.type.nbytes)


def stored(
    name: str, shape: tuple[int, ...], type: GGMLType, file: DataFile, offset: int
) -> FileTensor | QuantizedTensor:
    """The tensor that lies in a file from byte `offset` on. Raises MinisaError for a type that cannot be read."""
    if dtype := PLAIN.get(type.name):
        return FileTensor(name, shape, dtype, file, offset)
    if len(shape) != 2:
        raise MinisaError(f"{name} is {type.name} {list(shape)}: expected only matrices to be quantized")
    return QuantizedTensor(name, shape, type, decoder(type, name), file, offset)


def decoder(type: GGMLType, name: str = "a tensor") -> Decoder:
    """What turns blocks of `type` into floats; `name` is the tensor's, for messages.

    Raises MinisaError for a type that needs the `gguf` package where that is absent, or that nobody reads.
    """
    if type.name in _OWN:
        return partial(_floats, type.name)
    try:
        from gguf import GGMLQuantizationType, quants
    except ImportError:
        raise MinisaError(f'{name} is {type.name}, which needs the gguf package: pip install "minisa[gguf]"') from None

    def decode(blocks: Tensor) -> Tensor:
        flat = blocks.view(-1, type.nbytes).numpy()
        return torch.from_numpy(quants.dequantize(flat, GGMLQuantizationType(type.code))).view(len(blocks), -1)

    try:
        decode(torch.zeros(1, 1, type.nbytes, dtype=torch.uint8))
    except (NotImplementedError, ValueError):
        raise MinisaError(f"{name} is {type.name}, which not even the gguf package can read") from None
    return decode


def _floats(name: str, blocks: Tensor) -> Tensor:
    """What Blocks.dequantize gives, without a copy for each operation."""
    parts = _split(name, blocks)
    weight = parts.quants.unflatten(1, (-1, BLOCK)).float().mul_(parts.scales.float()[..., None])
    return (weight if parts.minimums is None else weight.add_(parts.minimums.float()[..., None])).flatten(1)


def _split(name: str, blocks: Tensor) -> Blocks:
    """A block's scale, and its minimum where it has one, are fp16 and in front of the quants."""
    if name == "Q8_0":
        return Blocks(blocks[..., 2:].view(torch.int8).flatten(1), _halves(blocks[..., :2]))
    begin = blocks.shape[-1] - BLOCK // 2
    packed, scales = blocks[..., begin:], _halves(blocks[..., :2])
    # [rows, blocks, 16] → [rows, blocks · 32]: a block's low halves, then its high ones
    quants = torch.cat((packed & 15, packed >> 4), dim=-1).view(torch.int8).flatten(1)
    return Blocks(quants, scales, -8 * scales if name == "Q4_0" else _halves(blocks[..., 2:4]))


def _halves(raw: Tensor) -> Tensor:
    return raw.contiguous().view(torch.float16).squeeze(-1)  # [rows, blocks]
