"""What torch.save writes: Hugging Face's pytorch_model.bin, and Meta's consolidated.NN.pth, one file for each
model-parallel rank.

Such a file is a zip archive of a pickle and the tensors' bytes. Neither torch.load nor Python's unpickler touches it:
pickled.py finds out where each tensor lies, and its elements are read in place.
"""

from __future__ import annotations

import itertools
import math
import struct
import zipfile
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch

from minisa.checkpoint.files import DataFile, FileTensor, is_size
from minisa.checkpoint.pickled import PickledTensor, read_pickle
from minisa.errors import MinisaError
from minisa.files import open_plain

MAX_PICKLE = 1 << 20  # bytes; that of Llama 3 405B, and its archive's directory, are far below one megabyte

# Column-parallel layers divide their output (rows of the weight), row-parallel ones their input (columns).
_SPLIT_DIM = {"wq": 0, "wk": 0, "wv": 0, "w1": 0, "w3": 0, "output": 0, "wo": 1, "w2": 1}
_LOCAL_HEADER = struct.Struct("<26xHH")  # before a part's bytes; at its end the lengths of a name and an extra field


def read_pth(path: Path) -> dict[str, FileTensor]:
    """The tensors of one file by name, in the order they lie in it.

    Raises MinisaError for anything but a dictionary of contiguous tensors, and for a pickle that carries code.
    """
    archive = _open(path)
    try:
        content = read_pickle(archive.pickle)
    except MinisaError as error:
        raise MinisaError(f"{path}: {error}") from None
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise MinisaError(f"{path}: corrupt, or more than tensors (its pickle: {error}): fetch it again") from None
    if not isinstance(content, dict) or not content:
        raise MinisaError(f"{path}: expected a dictionary of tensors, found {type(content).__name__}")
    tensors = [_tensor(name, tensor, archive) for name, tensor in content.items()]
    return {tensor.name: tensor for tensor in sorted(tensors, key=lambda tensor: tensor.offset)}


class _Bounded(BufferedReader):
    """The file as zipfile may read it: each entry of a directory becomes an object of many times its bytes."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > MAX_PICKLE:
            raise MinisaError(f"{self.name}: a directory of {size} bytes in the archive: this is not a model")
        return super().read(size)


@dataclass(frozen=True, slots=True)
class _Archive:
    """storages: where the bytes of each part with elements begin and end in the file, by its key."""

    file: DataFile
    pickle: bytes
    storages: dict[str, tuple[int, int]]


def _open(path: Path) -> _Archive:
    """Raises MinisaError for what is no zip archive, or has compressed parts: their bytes cannot be read in place."""
    file = DataFile(path)
    try:
        with _Bounded(open_plain(path).detach()) as bounded, zipfile.ZipFile(bounded) as archive:
            entries = archive.infolist()
            if any(entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 for entry in entries):
                raise MinisaError(f"{path}: a compressed archive: expected a file as torch.save writes it")
            if len({entry.filename.lower() for entry in entries}) < len(entries):  # torch looks for a name in any case
                raise MinisaError(f"{path}: corrupt: two parts of one name")
            pickles = [entry for entry in entries if entry.filename.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise MinisaError(f"{path}: corrupt: {len(pickles)} parts called data.pkl, expected one")
            if pickles[0].file_size > MAX_PICKLE:
                raise MinisaError(f"{path}: its pickle is larger than {MAX_PICKLE >> 20} MiB: this is not a model")
            pickle = archive.read(pickles[0])
            folder = pickles[0].filename.removesuffix("data.pkl")
            if f"{folder}byteorder" in archive.namelist():
                with archive.open(f"{folder}byteorder") as order:
                    if order.read(7) != b"little":
                        raise MinisaError(f"{path}: numbers of another byte order: expected little-endian ones")
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError, EOFError) as error:
        raise MinisaError(
            f"{path}: not a zip archive as torch.save writes it ({error}): truncated, or older than torch 1.6"
        ) from None
    ends = dict(itertools.pairwise(sorted({*(entry.header_offset for entry in entries), file.size})))
    storages = {}
    for entry in entries:
        folder_of_storages, _, key = entry.filename.rpartition("/")
        if folder_of_storages == f"{folder}data":
            begin = entry.header_offset
            header = file.read(begin, _LOCAL_HEADER.size).numpy().tobytes()
            data = begin + _LOCAL_HEADER.size + sum(_LOCAL_HEADER.unpack(header))
            storages[key] = (data, min(data + entry.file_size, ends.get(begin, begin)))
    return _Archive(file, pickle, storages)


def _tensor(name: Any, tensor: Any, archive: _Archive) -> FileTensor:
    where = f"{archive.file.path}: {name!r}"
    if not isinstance(name, str) or not isinstance(tensor, PickledTensor):
        kind = "Tensor" if isinstance(tensor, PickledTensor) else type(tensor).__name__
        raise MinisaError(f"{where} is a {kind}: expected a dictionary of tensors")
    shape, stride, dtype = tensor.shape, tensor.stride, tensor.storage.dtype
    if not (isinstance(shape, tuple) and isinstance(stride, tuple) and len(shape) == len(stride) <= 8):
        raise MinisaError(f"{where} has no shape: the file is corrupt, fetch it again")
    if not all(map(is_size, (*shape, *stride, tensor.offset))):
        raise MinisaError(f"{where}: its shape or place is no whole number: the file is corrupt, fetch it again")
    contiguous = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    if any(size > 1 and wanted != found for size, wanted, found in zip(shape, contiguous, stride, strict=True)):
        raise MinisaError(f"{where} is not contiguous: expected plain tensors")
    begin, end = archive.storages.get(tensor.storage.key, (0, 0))
    whole = tensor.storage.size == (end - begin) / dtype.itemsize  # else its elements are of another kind
    begin += tensor.offset * dtype.itemsize
    if not whole or begin + math.prod(shape) * dtype.itemsize > end:
        raise MinisaError(f"{where} does not lie inside its part of the archive: the file is corrupt, fetch it again")
    return FileTensor(name, shape, dtype, archive.file, begin)


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
