"""Meta's consolidated.NN.pth: what torch.save writes, one file for each model-parallel rank.

Such a file is a zip archive of a pickle and the tensors' bytes. torch.load with weights_only=True vets the pickle,
which may name tensors and nothing that runs; on the meta device it reads no element, only where each tensor lies.
"""

from __future__ import annotations

import re
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from minisa.checkpoint.files import DataFile, FileTensor
from minisa.errors import MinisaError

MAX_PICKLE = 64 << 20  # bytes; that of Llama 3 405B is far below one megabyte

# Column-parallel layers divide their output (rows of the weight), row-parallel ones their input (columns).
_SPLIT_DIM = {"wq": 0, "wk": 0, "wv": 0, "w1": 0, "w3": 0, "output": 0, "wo": 1, "w2": 1}


def read_pth(path: Path) -> dict[str, FileTensor]:
    """The tensors of one file by name, in the order they lie in it.

    Raises MinisaError for anything but a dictionary of contiguous tensors, and for a pickle that carries code.
    """
    boundaries = _boundaries(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of TorchScript archives before it refuses them
            content = torch.load(path, map_location="meta", weights_only=True)
    except UnpicklingError as error:
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        what = f"asks for {wanted[1]}" if wanted else "holds more than tensors"
        raise MinisaError(
            f"{path}: refused: its pickle {what}, and loading that could run code; get a file of weights only"
        ) from None
    except Exception as error:  # a corrupt pickle can fail in any way
        reason = str(error).partition("\n")[0]
        raise MinisaError(f"{path}: corrupt ({type(error).__name__}: {reason}): fetch it again") from None
    if not isinstance(content, dict) or not content:
        raise MinisaError(f"{path}: expected a dictionary of tensors, found {type(content).__name__}")
    file = DataFile(path)
    tensors = [_tensor(name, tensor, file, boundaries) for name, tensor in content.items()]
    return {tensor.name: tensor for tensor in sorted(tensors, key=lambda tensor: tensor.offset)}


def _boundaries(path: Path) -> list[int]:
    """Where the parts of the archive begin and the last one ends, in bytes, ascending.

    Raises MinisaError for what is no zip archive, or has compressed parts: their bytes cannot be read in place.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError) as error:
        raise MinisaError(
            f"{path}: not a zip archive as torch.save writes it ({error}): truncated, or older than torch 1.6"
        ) from None
    if any(entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 for entry in entries):
        raise MinisaError(f"{path}: a compressed archive: expected a file as torch.save writes it")
    if any(entry.filename.endswith(".pkl") and entry.file_size > MAX_PICKLE for entry in entries):
        raise MinisaError(f"{path}: its pickle is larger than {MAX_PICKLE >> 20} MiB: this is not a model")
    return sorted([*(entry.header_offset for entry in entries), path.stat().st_size])


def _tensor(name: Any, tensor: Any, file: DataFile, boundaries: list[int]) -> FileTensor:
    where = f"{file.path}: {name!r}"
    if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
        raise MinisaError(f"{where} is a {type(tensor).__name__}: expected a dictionary of tensors")
    if tensor.layout != torch.strided or tensor.is_quantized or not tensor.is_contiguous():
        raise MinisaError(f"{where} is sparse, quantized or not contiguous: expected plain tensors")
    part = tensor.untyped_storage()._checkpoint_offset  # None for a tensor that is no part of the archive
    begin = int(part or 0) + int(tensor.storage_offset()) * tensor.itemsize
    end = next((edge for edge in boundaries if part is not None and edge > part), 0)
    if begin + tensor.nbytes > end:
        raise MinisaError(f"{where} does not lie inside its part of the archive: the file is corrupt, fetch it again")
    return FileTensor(name, tuple(tensor.shape), tensor.dtype, file, begin)


@dataclass(frozen=True, slots=True)
class MergedTensor:
    """A tensor whose rows (dim 0) or columns (dim 1) are divided among shards."""

    name: str
    shape: tuple[int, ...]
    shards: tuple[FileTensor, ...]
    dim: int

    def read_rows(self, start: int, stop: int) -> torch.Tensor:
        if self.dim == 1:
            return torch.cat([shard.read_rows(start, stop) for shard in self.shards], dim=1)
        pieces, first = [], 0
        for shard in self.shards:
            last = first + shard.shape[0]
            if start < last and first < stop:
                pieces.append(shard.read_rows(max(start, first) - first, min(stop, last) - first))
            first = last
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def merge(shards: list[dict[str, FileTensor]], width: Any) -> dict[str, FileTensor | MergedTensor]:
    """One model out of its ranks' tensors; `width` is what params.json gives as the model's dim.

    Embeddings are divided by columns in Llama 2 and by rows in Llama 3, which their shape tells.
    Raises MinisaError when the shards are not parts of one model.
    """
    first, *others = shards
    for other in others:
        if unpaired := first.keys() ^ other.keys():
            tensor = next(iter((first | other)[name] for name in sorted(unpaired)))
            raise MinisaError(f"{tensor.file.path}: {tensor.name!r} is not in every shard: are they of one model?")
    if not others:
        return dict(first)
    return {name: _merged(tuple(shard[name] for shard in shards), width) for name in first}


def _merged(shards: tuple[FileTensor, ...], width: Any) -> FileTensor | MergedTensor:
    first = shards[0]
    for shard in shards:
        if (shard.shape, shard.dtype) != (first.shape, first.dtype):
            raise MinisaError(
                f"{shard.file.path}: {shard.name!r} has shape {list(shard.shape)}, and {list(first.shape)} in "
                f"{first.file.path.name}: expected shards of one size"
            )
    if len(first.shape) != 2:
        return first  # norms are in every shard
    module = first.name.removesuffix(".weight").rpartition(".")[2]
    split = _SPLIT_DIM.get(module, 0 if first.shape[1] == width else 1)
    shape = list(first.shape)
    shape[split] *= len(shards)
    return MergedTensor(first.name, tuple(shape), shards, split)
