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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from minisa.checkpoint.ggml import TYPES, GGMLType
from minisa.errors import MinisaError
from minisa.files import MAX_VALUES, open_plain

MAGIC = b"GGUF"
MAX_HEADER = 64 << 20  # bytes; the largest vocabularies take 16 MB, and all below is bounded by this
MAX_DEPTH = 4  # arrays inside arrays
_STRING, _ARRAY, _BOOL = 8, 9, 7
_NUMBERS = {  # the codes of value types
    code: np.dtype(name).newbyteorder("<")
    for code, name in {
        0: "u1", 1: "i1", 2: "u2", 3: "i2", 4: "u4", 5: "i4", 6: "f4", _BOOL: "u1", 10: "u8", 11: "i8", 12: "f8",
    }.items()
}  # fmt: skip
_PART = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<count>\d{5})\.gguf")  # as llama.cpp names the parts of a split file
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")


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
        count = _count(path)
        yield from (path.with_name(f"{part['stem']}-{i:05}-of-{count:05}.gguf") for i in range(1, count + 1))
    else:
        yield path


def _count(path: Path) -> int:
    part = _PART.fullmatch(path.name)
    return max(int(part["count"]), 1) if part else 1


def find_gguf(directory: Path) -> list[Path]:
    """The GGUF models of a directory; one in parts by the first of them."""
    return sorted({next(gguf_parts(path)) for path in directory.glob("*.gguf")})


def read_gguf_parts(path: Path) -> list[GGUFFile]:
    """The headers of a model's files, the first of which has its description; a single one for a model in one file.

    path: any of them. Raises MinisaError if one is missing or is not the part that its name says, as read_gguf
    otherwise.
    """
    n_parts = _count(path)
    headers: list[GGUFFile] = []
    for number, part in enumerate(gguf_parts(path)):
        if number and not part.is_file():
            raise MinisaError(f"{part}: missing, part {number + 1} of {n_parts} of a split GGUF: fetch every part")
        header = read_gguf(part)
        count = header.metadata.get("split.count", 0) or 1  # a merged file keeps the key, at 0
        place = header.metadata.get("split.no", 0)
        if (count, place) != (n_parts, number):
            raise MinisaError(
                f"{part}: by its metadata part {place!r} (counted from 0) of {count!r}: expected the parts' own names, "
                "NAME-00001-of-00002.gguf and so on"
            )
        headers.append(header)
    twice = [
        name for name, times in Counter(info.name for header in headers for info in header.tensors).items() if times > 1
    ]
    if twice:
        raise MinisaError(f"{path}: the tensor {twice[0]!r} stands in two of {n_parts} parts: fetch them again")
    return headers


class _Header:
    """A cursor over the mapped file. Every read is checked against the file's end, and MAX_HEADER."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self.data = data
        self.position = 4  # behind the magic
        self.limit = min(len(data), MAX_HEADER)
        self.n_values = 0  # so far

    def fail(self, what: str) -> NoReturn:
        raise MinisaError(f"{self.path}: {what}")

    def parse(self) -> GGUFFile:
        version = self.number(_U32)
        if version not in (2, 3):
            if version and version % 65_536 == 0:
                self.fail("a big-endian GGUF file: expected a little-endian one")
            self.fail(f"GGUF version {version} is not supported: expected 2 or 3")
        n_tensors, n_pairs = self.number(_U64), self.number(_U64)
        metadata = self.pairs(n_pairs)
        infos = self.infos(n_tensors)
        alignment = metadata.get("general.alignment", 32)
        if not (isinstance(alignment, int) and 0 < alignment <= 1 << 20 and alignment.bit_count() == 1):
            self.fail(f"general.alignment is {alignment!r}: expected a power of two")
        start = -(-self.position // alignment) * alignment
        tensors = [TensorInfo(info.name, info.shape, info.type, start + info.offset) for info in infos]
        self.check_layout(tensors, alignment)
        return GGUFFile(self.path, metadata, tuple(tensors))

    def pairs(self, count: int) -> dict[str, Any]:
        metadata: dict[str, Any] = {}
        self.need(count * 13, f"{count} metadata pairs")
        self.take_in(count)
        for _ in range(count):
            key = self.string()
            if key in metadata:
                self.fail(f"the metadata key {key!r} stands twice")
            metadata[key] = self.value(key, self.number(_U32), 0)
        return metadata

    def infos(self, count: int) -> list[TensorInfo]:
        """Tensor descriptions, their offsets still counted from the start of the data."""
        infos: dict[str, TensorInfo] = {}
        self.need(count * 32, f"{count} tensors")
        self.take_in(count * 8)  # each has a name, a shape and a place
        for _ in range(count):
            name = self.string()
            if name in infos:
                self.fail(f"the tensor {name!r} stands twice")
            n_dims = self.number(_U32)
            if not 1 <= n_dims <= 4:
                self.fail(f"the tensor {name!r} has {n_dims} dimensions: expected 1 to 4")
            shape = tuple(self.number(_U64) for _ in range(n_dims))[::-1]
            code = self.number(_U32)
            if code not in TYPES:
                self.fail(f"the tensor {name!r} has type {code}, which minisa does not know")
            if 0 in shape or shape[-1] % TYPES[code].block:
                self.fail(f"the tensor {name!r} of shape {list(shape)} cannot be made of {TYPES[code].name} blocks")
            infos[name] = TensorInfo(name, shape, TYPES[code], self.number(_U64))
        return list(infos.values())

    def check_layout(self, tensors: list[TensorInfo], alignment: int) -> None:
        """Sort the tensors by offset; refuse those that are misplaced, overlap or leave the file."""
        tensors.sort(key=lambda info: info.offset)
        end = self.position
        for info in tensors:
            if info.offset % alignment or info.offset < end:
                self.fail(f"the tensor {info.name!r} is misaligned or overlaps another: fetch the file again")
            end = info.offset + info.nbytes
            if end > len(self.data):
                self.fail(f"the tensor {info.name!r} ends {end - len(self.data)} bytes after the file: truncated?")

    def value(self, key: str, code: int, depth: int) -> Any:
        if code == _STRING:
            return self.string()
        if code == _ARRAY:
            code, count = self.number(_U32), self.number(_U64)
            if code == _STRING:
                return self.strings(count)
            if code == _ARRAY:
                if depth == MAX_DEPTH:
                    self.fail(f"{key!r} nests arrays more than {MAX_DEPTH} deep")
                self.need(count * 12, f"{key!r} with {count} arrays")
                self.take_in(count)
                return [self.value(key, code, depth + 1) for _ in range(count)]
            return self.numbers(key, code, count)
        return self.numbers(key, code, 1)[0]

    def numbers(self, key: str, code: int, count: int) -> list[Any]:
        dtype = _NUMBERS.get(code)
        if dtype is None:
            self.fail(f"{key!r} has value type {code}, which GGUF does not define")
        self.need(count * dtype.itemsize, f"{key!r} with {count} values")
        self.take_in(count)
        end = self.position + count * dtype.itemsize
        values = np.frombuffer(self.data[self.position : end], dtype)  # of a copy: an array would pin the mapping
        self.position = end
        if code != _BOOL:
            return values.tolist()
        if (values > 1).any():
            self.fail(f"{key!r} has a boolean that is neither 0 nor 1")
        return values.astype(bool).tolist()

    def number(self, format: struct.Struct) -> int:
        self.need(format.size, "the next number")
        (value,) = format.unpack_from(self.data, self.position)
        self.position += format.size
        return value

    def string(self) -> str:
        return self.strings(1)[0]

    def strings(self, count: int) -> list[str]:
        """`count` strings, each behind its length; the loop that reads whole vocabularies."""
        self.need(count * 8, f"{count} strings")
        self.take_in(count)
        data, position, limit, unpack = self.data, self.position, self.limit, _U64.unpack_from
        strings = []
        for _ in range(count):
            begin = position + 8
            if begin > limit:
                self.overrun(f"{count} strings")
            position = begin + unpack(data, begin - 8)[0]
            if position > limit:
                self.overrun(f"a string of {position - begin} bytes")
            strings.append(data[begin:position].decode("utf-8", "surrogateescape"))
        self.position = position
        return strings

    def need(self, nbytes: int, what: str) -> None:
        if self.position + nbytes > self.limit:
            self.overrun(what)

    def take_in(self, count: int) -> None:
        self.n_values += count
        if self.n_values > MAX_VALUES:
            self.fail(f"the header has more than {MAX_VALUES} values: this is not a model")

    def overrun(self, what: str) -> NoReturn:
        if self.limit < len(self.data):
            self.fail(f"the header has no end in {MAX_HEADER >> 20} MiB (at {what}): the file is corrupt")
        self.fail(f"the file ends inside its header (at {what}): fetch it again")
