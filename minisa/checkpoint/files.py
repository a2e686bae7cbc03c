"""What the formats share: a file read in ranges, and a tensor that lies in it.

Ranges are read, not memory-mapped: a mapped page counts as resident memory until the kernel drops it, and a file that
shrinks under a mapping kills the process instead of raising an error.
"""

from __future__ import annotations

import math
import os
import threading
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from minisa.errors import MinisaError
from minisa.files import open_plain

WEIGHT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class StoredTensor(Protocol):
    """A tensor in a file, of which nothing has been read but its header."""

    @property
    def name(self) -> str:
        """As the file has it, for messages."""

    @property
    def shape(self) -> tuple[int, ...]:
        """In torch's order: a linear layer is [out, in]."""

    def read_rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows start to stop of the first dimension, on the CPU, in a floating dtype of the file's choosing.

        Raises MinisaError when the file has become shorter than its header says.
        """


class DataFile:
    """A file held open and read in ranges, by any thread."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = open_plain(path)
        self._reading = threading.Lock()
        self.size = os.fstat(self._file.fileno()).st_size
        weakref.finalize(self, self._file.close)

    def read(self, offset: int, nbytes: int) -> torch.Tensor:
        """uint8 [nbytes], the bytes from `offset` on. Raises MinisaError where the file ends before the last."""
        data = torch.empty(nbytes, dtype=torch.uint8)
        with self._reading:
            self._file.seek(offset)
            count = self._file.readinto(data.numpy().data)
        if count < nbytes:
            raise MinisaError(f"{self.path}: ends {nbytes - count} bytes early: fetch the file again")
        return data


@dataclass(frozen=True, slots=True)
class FileTensor:
    """A tensor whose elements lie plain and contiguous in a file, from byte `offset` on."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    file: DataFile
    offset: int

    @property
    def end(self) -> int:
        """The offset of the first byte after it."""
        return self.offset + math.prod(self.shape) * self.dtype.itemsize

    def read_rows(self, start: int, stop: int) -> torch.Tensor:
        row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        data = self.file.read(self.offset + start * row_bytes, (stop - start) * row_bytes)
        return data.view(self.dtype).view(stop - start, *self.shape[1:])

    def require_weight_dtype(self) -> None:
        """Raises MinisaError unless the elements are fp32, fp16 or bf16."""
        if self.dtype not in WEIGHT_DTYPES:
            raise MinisaError(
                f"{self.file.path}: {self.name} is stored as {str(self.dtype).removeprefix('torch.')}: expected "
                "fp32, fp16 or bf16 (or a GGUF file)"
            )
