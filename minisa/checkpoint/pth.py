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
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ValueError("a compressed archive, which torch.save never writes")
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
    tensors = [_tensor(name, tensor, file) for name, tensor in content.items()]
    return {tensor.name: tensor for tensor in sorted(tensors, key=lambda tensor: tensor.offset)}


def _reason(error: Exception) -> str:
    """What torch says in many lines, in one."""
    text = str(error)
    if wanted := re.search(r"GLOBAL (\S+)", text):
        return f"refused: its pickle asks for {wanted[1]}, and loading that could run code; get a file of weights only"
    detail = text.rpartition("WeightsUnpickler error: ")[2].partition("\n")[0].partition(". ")[0]
    return f"damaged, or more than weights ({type(error).__name__}: {detail}): fetch it again"


def _tensor(name: Any, tensor: Any, file: DataFile) -> FileTensor:
    where = f"{file.path}: {name!r}" if isinstance(name, str) else f"{file.path}: a key that is no name"
    if not isinstance(name, str) or not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
        raise MinisaError(f"{where} holds a {type(tensor).__name__}: expected a dictionary of plain tensors")
    if not tensor.is_contiguous():
        raise MinisaError(f"{where} is not contiguous: expected plain tensors")
    storage: Any = tensor.untyped_storage()
    begin = getattr(storage, "_checkpoint_offset", None) or file.size  # none where the storage is not of the file
    begin += int(tensor.storage_offset()) * tensor.dtype.itemsize
    found = FileTensor(name, tuple(tensor.shape), tensor.dtype, file, begin)
    if found.end > file.size:
        raise MinisaError(f"{where} does not lie inside the file: it is damaged, fetch it again")
    return found
