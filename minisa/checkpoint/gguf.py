"""GGUF files: llama.cpp's container of metadata (tokenizer included) and tensors.

Little-endian: magic, version, counts, key-value pairs, tensor descriptions, padding, tensor data.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from minisa.checkpoint.ggml import TYPES, GGMLType
from minisa.errors import MinisaError
from minisa.files import MAX_VALUES, open_plain

MAGIC = b"GGUF"
_NUMBERS = {  # by the codes of value types
    code: np.dtype(name)
    for code, name in {
        0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8",
    }.items()
}  # fmt: skip
_U32, _U64, _STRING, _ARRAY = 4, 10, 8, 9
_LENGTH = struct.Struct("<Q")
_PART = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<count>\d{5})\.gguf")  # as llama.cpp names the parts of a split file


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor's description: shape in torch's order, offset in bytes from the start of the file."""

    name: str
    shape: tuple[int, ...]
    type: GGMLType
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) // self.type.block * self.type.nbytes


@dataclass(frozen=True, slots=True)
class GGUFFile:
    """The header of a GGUF file.

    metadata: numbers, booleans, strings and lists of them. Bytes that are no UTF-8 (some vocabularies have such
        tokens) come as lone surrogates: `.encode("utf-8", "surrogateescape")` gives them back.
    tensors: in the order they lie in the file.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: tuple[TensorInfo, ...]


def is_gguf(path: Path) -> bool:
    """Whether a file is one by its content, whatever its name. OSError when it cannot be read."""
    with open_plain(path) as file:
        return file.read(4) == MAGIC


def read_gguf(path: Path) -> GGUFFile:
    """The header of a GGUF file of version 2 or 3.

    Raises MinisaError where header and file disagree, OSError when the file cannot be read.
    """
    with open_plain(path) as file:
        if (start := file.read(4)) != MAGIC:
            raise MinisaError(
                f"{path}: not a GGUF file (it begins with {start!r}): expected a .gguf file or a checkpoint's folder"
            )
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Header(path, data).parse()


def gguf_parts(path: Path) -> Iterator[Path]:
    """The files of the model that `path` is a part of, by its name: NAME-00001-of-00003.gguf and on; else `path`."""
    if part := _PART.fullmatch(path.name):
        count = max(int(part["count"]), 1)
        yield from (path.with_name(f"{part['stem']}-{i:05}-of-{count:05}.gguf") for i in range(1, count + 1))
    else:
        yield path


def find_gguf(directory: Path) -> list[Path]:
    """The GGUF models of a directory; one in parts by the first of them."""
    return sorted({next(gguf_parts(path)) for path in directory.glob("*.gguf")})


def read_gguf_parts(path: Path) -> list[GGUFFile]:
    """The headers of a model's files, the first of which has its description; a single one for a model in one file.

    path: any of them. Raises MinisaError if one is missing or two hold the same tensor, as read_gguf otherwise.
    """
    parts = [*gguf_parts(path)]
    headers: list[GGUFFile] = []
    for number, part in enumerate(parts, 1):
        if number > 1 and not part.is_file():
            raise MinisaError(f"{part}: missing, part {number} of {len(parts)} of a split GGUF: fetch every part")
        headers.append(read_gguf(part))
    if (count := headers[0].metadata.get("split.count", 0) or 1) != len(parts):  # a merged file keeps the key, at 0
        raise MinisaError(
            f"{parts[0]}: by its metadata the first of {count!r} parts: expected the parts' own names, "
            "NAME-00001-of-00002.gguf and so on"
        )
    names = Counter(info.name for header in headers for info in header.tensors)
    if twice := [name for name, count in names.items() if count > 1]:
        raise MinisaError(f"{path}: the tensor {twice[0]!r} stands twice: fetch the file again, or every part of it")
    return headers


class _Header:
    """A cursor over the mapped file. No count is believed before the file is known to hold as many bytes."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self.data = data
        self.position = 4  # behind the magic
        self.n_values = 0  # so far

    def fail(self, what: str) -> NoReturn:
        raise MinisaError(f"{self.path}: {what}")

    def claim(self, count: int, nbytes: int, what: str) -> None:
        """Raises MinisaError unless `count` values of at least `nbytes` each can follow."""
        if self.position + count * nbytes > len(self.data):
            self.fail(f"the file ends inside its header (at {count} {what}): fetch it again")
        self.n_values += count
        if self.n_values > MAX_VALUES:
            self.fail(f"the header has more than {MAX_VALUES} values: this is not a model")

    def parse(self) -> GGUFFile:
        if (version := self.value(_U32)) not in (2, 3):
            self.fail(f"GGUF version {version} is not supported: expected 2 or 3, little-endian")
        n_tensors, n_pairs = self.value(_U64), self.value(_U64)
        self.claim(n_pairs, 13, "metadata pairs")
        metadata = {self.value(_STRING): self.value(self.value(_U32)) for _ in range(n_pairs)}
        self.claim(n_tensors, 32, "tensors")
        infos = [self.info() for _ in range(n_tensors)]
        alignment = metadata.get("general.alignment", 32)
        if not (isinstance(alignment, int) and 0 < alignment <= 1 << 20 and alignment.bit_count() == 1):
            self.fail(f"general.alignment is {alignment!r}: expected a power of two")
        end = start = -(-self.position // alignment) * alignment
        tensors = sorted((replace(info, offset=start + info.offset) for info in infos), key=lambda info: info.offset)
        for info in tensors:
            if info.offset % alignment or info.offset < end:
                self.fail(f"the tensor {info.name!r} is misaligned or overlaps another: fetch the file again")
            end = info.offset + info.nbytes
            if end > len(self.data):
                self.fail(f"the tensor {info.name!r} ends {end - len(self.data)} bytes after the file: truncated?")
        return GGUFFile(self.path, metadata, tuple(tensors))

    def info(self) -> TensorInfo:
        """A tensor's description, its offset counted from the start of the data."""
        name, n_dims = self.value(_STRING), self.value(_U32)
        shape = tuple(self.values(_U64, n_dims))[::-1]
        code, offset = self.value(_U32), self.value(_U64)
        if code not in TYPES:
            self.fail(f"the tensor {name!r} has type {code}, which minisa does not know")
        if not 1 <= n_dims <= 4 or 0 in shape or shape[-1] % TYPES[code].block:
            self.fail(f"the tensor {name!r} of shape {list(shape)} cannot be made of {TYPES[code].name} blocks")
        return TensorInfo(name, shape, TYPES[code], offset)

    def value(self, code: int) -> Any:
        return self.values(code, 1)[0]

    def values(self, code: int, count: int, depth: int = 0) -> list[Any]:
        """The next `count` values of the type that `code` stands for."""
        if code == _STRING:
            return self.strings(count)
        if code == _ARRAY:
            if depth > 4:
                self.fail("arrays nested more than 4 deep")
            self.claim(count, 12, "arrays")
            return [self.values(self.value(_U32), self.value(_U64), depth + 1) for _ in range(count)]
        if code not in _NUMBERS:
            self.fail(f"a value of type {code}, which GGUF does not define")
        dtype = _NUMBERS[code]
        self.claim(count, dtype.itemsize, "numbers")
        begin, self.position = self.position, self.position + count * dtype.itemsize
        return np.frombuffer(self.data[begin : self.position], dtype).tolist()

    def strings(self, count: int) -> list[str]:
        """`count` strings, each behind its length; the loop that reads whole vocabularies."""
        self.claim(count, 8, "strings")
        data, end, unpack = self.data, self.position, _LENGTH.unpack_from
        strings = []
        for _ in range(count):
            begin = end + 8
            end = begin + (unpack(data, end)[0] if begin <= len(data) else 0)
            if end > len(data):
                self.fail(f"the file ends inside its header (at a string of {end - begin} bytes): fetch it again")
            strings.append(data[begin:end].decode("utf-8", "surrogateescape"))
        self.position = end
        return strings
