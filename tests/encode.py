"""The byte formats under tests/tiny.py's checkpoints: safetensors, GGUF, ggml's blocks, torch's zip archives."""

from __future__ import annotations

import json
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

SAFETENSORS_DTYPES = {
    torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64", torch.int64: "I64",
    torch.int8: "I8", torch.float8_e4m3fn: "F8_E4M3",
}  # fmt: skip


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": SAFETENSORS_DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    path.write_bytes(encode_safetensors(header, b"".join(raw_bytes(tensor) for tensor in tensors.values())))


def encode_safetensors(header: Any, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def raw_bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


GGML_CODES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 8, "BF16": 30}


def encode_gguf(
    metadata: Mapping[str, Any], tensors: Mapping[str, tuple[int, tuple[int, ...], bytes]], version: int = 3
) -> bytes:
    """The bytes of a GGUF file. tensors: ggml type code, shape in torch's order, data."""
    alignment = metadata.get("general.alignment", 32)
    head = [b"GGUF", struct.pack("<IQQ", version, len(tensors), len(metadata))]
    head += [gguf_string(key) + gguf_value(value) for key, value in metadata.items()]
    data: list[bytes] = []
    offset = 0
    for name, (code, shape, content) in tensors.items():
        head.append(gguf_string(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape)))
        head.append(struct.pack("<IQ", code, offset))
        padded = content + bytes(-len(content) % alignment)
        data.append(padded)
        offset += len(padded)
    header = b"".join(head)
    return header + bytes(-len(header) % alignment) + b"".join(data)


def gguf_string(text: str) -> bytes:
    encoded = text.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(encoded)) + encoded


def gguf_value(value: Any) -> bytes:
    """Type code and value: bool, uint32 (else int64), float32, string, or an array of such (numbers as int32)."""
    if isinstance(value, bool):
        return struct.pack("<IB", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value) if 0 <= value < 1 << 32 else struct.pack("<Iq", 11, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + gguf_string(value)
    kind = type(value[0]) if value else str
    code = {bool: 7, int: 5, float: 6, str: 8, list: 9}[kind]
    if kind is str:
        content = b"".join(gguf_string(item) for item in value)
    elif kind is list:
        content = b"".join(gguf_value(item)[4:] for item in value)
    else:
        content = struct.pack(f"<{len(value)}{ {bool: 'B', int: 'i', float: 'f'}[kind] }", *value)
    return struct.pack("<IIQ", 9, code, len(value)) + content


def quantize(tensor: Tensor, type: str) -> bytes:
    """A tensor in a ggml type, rounded to nearest."""
    if dtype := {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}.get(type):
        return raw_bytes(tensor.to(dtype))
    blocks = tensor.float().numpy().reshape(-1, 32)
    if type == "Q8_0":
        scale = (np.abs(blocks).max(1, keepdims=True) / 127).astype(np.float16)
        codes = np.rint(_ratio(blocks, scale)).astype(np.int8).view(np.uint8)
        return np.concatenate([scale.view(np.uint8), codes], axis=1).tobytes()
    if type == "Q4_0":
        extreme = np.take_along_axis(blocks, np.abs(blocks).argmax(1)[:, None], axis=1)
        scale = (extreme / -8).astype(np.float16)
        codes = np.rint(_ratio(blocks, scale)) + 8
        return np.concatenate([scale.view(np.uint8), _pack(codes)], axis=1).tobytes()
    assert type == "Q4_1", type
    low, high = blocks.min(1, keepdims=True), blocks.max(1, keepdims=True)
    scale, least = ((high - low) / 15).astype(np.float16), low.astype(np.float16)
    codes = np.rint(_ratio(blocks - least, scale))
    return np.concatenate([scale.view(np.uint8), least.view(np.uint8), _pack(codes)], axis=1).tobytes()


def _ratio(blocks: np.ndarray, scale: np.ndarray) -> np.ndarray:
    wide = scale.astype(np.float32)
    return np.divide(blocks, wide, out=np.zeros_like(blocks), where=wide != 0)


def _pack(codes: np.ndarray) -> np.ndarray:
    """[n, 32] numbers → [n, 16] bytes: number i in the low half of byte i, number i + 16 in the high half."""
    nibbles = codes.clip(0, 15).astype(np.uint8)
    return nibbles[:, :16] | nibbles[:, 16:] << 4


def repack_zip(file: Path, edit: Callable[[str, bytes], bytes | None], compression: int = zipfile.ZIP_STORED) -> None:
    """Write the archive anew, each part as `edit` makes it out of its name and content; None leaves it out.

    Without torch's .format_version, from which torch.load concludes that the parts are padded as torch pads them.
    """
    with zipfile.ZipFile(file) as archive:
        parts = {entry.filename: edit(entry.filename, archive.read(entry)) for entry in archive.infolist()}
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, part in parts.items():
            if part is not None and not name.endswith(".format_version"):
                archive.writestr(name, part)
