"""safetensors files.

A file is an 8-byte little-endian length, a JSON header of that length, and the elements of all tensors, one after
the other. The header is believed only once it accounts for every byte of the file.
Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from minisa.checkpoint.files import DataFile, FileTensor
from minisa.errors import MinisaError
from minisa.files import MAX_JSON, parse_json, written_whole

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E5M2": torch.float8_e5m2, "F8_E4M3": torch.float8_e4m3fn,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def read_safetensors(path: Path) -> dict[str, FileTensor]:
    """The tensors of one file by name, in the order they lie in it.

    Raises MinisaError where header and file disagree, OSError when the file cannot be read.
    """
    file = DataFile(path)
    if file.size < 8:
        raise MinisaError(f"{path}: {file.size} bytes is too short for a safetensors file: fetch it again")
    length = int.from_bytes(file.read(0, 8).numpy().tobytes(), "little")
    if length > min(MAX_JSON, file.size - 8):
        raise MinisaError(
            f"{path}: claims a header of {length} bytes in a file of {file.size}: truncated, or not a safetensors file"
        )
    header = parse_json(file.read(8, length).numpy().tobytes(), f"{path}: the header")
    header.pop("__metadata__", None)
    end = 8 + length
    tensors = [_tensor(name, entry, file, end) for name, entry in header.items()]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.end))
    for tensor in tensors:
        if tensor.offset != end:
            what = "overlaps the tensor before it" if tensor.offset < end else "leaves a gap before it"
            raise MinisaError(f"{path}: {tensor.name!r} {what}: the file is damaged, fetch it again")
        end = tensor.end
    if end != file.size:
        raise MinisaError(f"{path}: the header describes {end} bytes, the file has {file.size}: fetch it again")
    return {tensor.name: tensor for tensor in tensors}


def write_safetensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write tensors to one file, which has its name only once it is whole. Raises OSError where it cannot be."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header, offset = {}, 0
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": names[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    described = json.dumps(header).encode()
    described += b" " * (-len(described) % 8)  # the elements begin at a multiple of 8
    with written_whole(path) as partial, partial.open("wb") as file:
        file.write(len(described).to_bytes(8, "little") + described)
        for tensor in tensors.values():
            file.write(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())


def _tensor(name: str, entry: Any, file: DataFile, data: int) -> FileTensor:
    """One entry of the header; `data` is where the elements begin in the file."""
    try:
        dtype, shape, (begin, end) = DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise MinisaError(
            f"{file.path}: {name!r} is {entry!r}: expected a known dtype, a shape and two data_offsets"
        ) from None
    sizes = (*shape, begin, end)
    if len(shape) > 8 or not all(type(size) is int and 0 <= size < 1 << 63 for size in sizes):
        raise MinisaError(f"{file.path}: {name!r}: shape {shape} at {begin} to {end}: expected whole numbers")
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise MinisaError(f"{file.path}: {name!r}: {dtype} of shape {shape} does not take the bytes {begin} to {end}")
    return FileTensor(name, shape, dtype, file, data + begin)
