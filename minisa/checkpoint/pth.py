"""What torch.save writes: Hugging Face's pytorch_model.bin, and Meta's consolidated.NN.pth.

torch.load runs no code with weights_only, and with the meta device it reads no element: it tells where in the file
each storage lies. The elements are then read in place, like any other format's.
"""

from __future__ import annotations

import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

from minisa.checkpoint.files import DataFile, FileTensor
from minisa.errors import MinisaError


def read_pth(path: Path) -> dict[str, FileTensor]:
    """The tensors of one file by name, in the order they lie in it.

    Raises MinisaError for anything but a dictionary of contiguous tensors, OSError when the file cannot be read.
    """
    file = DataFile(path)
    try:
        with zipfile.ZipFile(path) as archive:
            parts = dict(_extent(entry, file) for entry in archive.infolist())
        with warnings.catch_warnings(action="ignore"):  # torch's, about pickles it does not know, which it then refuses
            content = torch.load(path, map_location="meta", mmap=True, weights_only=True)
    except zipfile.BadZipFile:
        raise MinisaError(
            f"{path}: no zip archive: fetch it again, or where torch older than 1.6 wrote it, save it with a newer one"
        ) from None
    except Exception as error:  # torch names no fixed set for files that are damaged
        raise MinisaError(f"{path}: {_reason(error)}") from None
    if not isinstance(content, dict) or not content:
        raise MinisaError(f"{path}: expected a dictionary of tensors, found {type(content).__name__}")
    tensors = [_tensor(name, tensor, file, parts) for name, tensor in content.items()]
    return {tensor.name: tensor for tensor in sorted(tensors, key=lambda tensor: tensor.offset)}


def _extent(entry: zipfile.ZipInfo, file: DataFile) -> tuple[int, int]:
    """Where the bytes of a part of the archive begin and end in the file."""
    if entry.compress_type != zipfile.ZIP_STORED:
        raise ValueError("a compressed archive, which torch.save never writes")
    lengths = file.read(entry.header_offset + 26, 4).numpy().view("<u2")  # of the name and of what else precedes them
    begin = entry.header_offset + 30 + int(lengths.sum())
    return begin, begin + entry.file_size


def _reason(error: Exception) -> str:
    """What torch says in many lines, in one."""
    text = str(error)
    if wanted := re.search(r"GLOBAL (\S+)", text):
        return f"refused: its pickle asks for {wanted[1]}, and loading that could run code; get a file of weights only"
    detail = text.rpartition("WeightsUnpickler error: ")[2].partition("\n")[0].partition(". ")[0]
    return f"damaged, or more than weights ({type(error).__name__}: {detail}): fetch it again"


def _tensor(name: Any, tensor: Any, file: DataFile, parts: dict[int, int]) -> FileTensor:
    """parts: where the storages of the file begin and end."""
    where = f"{file.path}: {name!r}" if isinstance(name, str) else f"{file.path}: a key that is no name"
    if not isinstance(name, str) or not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
        raise MinisaError(f"{where} holds a {type(tensor).__name__}: expected a dictionary of plain tensors")
    if not tensor.is_contiguous():
        raise MinisaError(f"{where} is not contiguous: expected plain tensors")
    storage: Any = tensor.untyped_storage()
    part = getattr(storage, "_checkpoint_offset", None) or 0  # where torch expects it
    found = FileTensor(
        name, tuple(tensor.shape), tensor.dtype, file, part + int(tensor.storage_offset()) * tensor.itemsize
    )
    if found.end > parts.get(part, 0):
        raise MinisaError(f"{where} does not lie in its part of the archive: fetch the file again")
    return found
