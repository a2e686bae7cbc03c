"""Weights in several files: shards that an index lists, and the parts of Meta's model-parallel ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from minisa.checkpoint.files import FileTensor
from minisa.errors import MinisaError
from minisa.files import is_plain_name, read_json

MAX_SHARDS = 1024
# Column-parallel layers divide their output (rows of the weight), row-parallel ones their input (columns).
_SPLIT_DIM = {"wq": 0, "wk": 0, "wv": 0, "w1": 0, "w3": 0, "output": 0, "wo": 1, "w2": 1}


def read_weight_map(path: Path, suffix: str = ".safetensors") -> dict[str, str]:
    """From each tensor's name to its file, as an index has them (model.safetensors.index.json).

    Format: huggingface.co/docs/safetensors. Raises MinisaError where it is not of that form, names anything but plain
    files of that suffix beside it, or more than MAX_SHARDS of them; OSError where it cannot be read.
    """
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise MinisaError(f"{path}: weight_map is missing: expected tensor names with their files")
    for shard in weight_map.values():
        if not (isinstance(shard, str) and is_plain_name(shard) and shard.endswith(suffix)):
            raise MinisaError(f"{path}: weight_map names {shard!r}: expected plain {suffix} file names")
    if (count := len(set(weight_map.values()))) > MAX_SHARDS:
        raise MinisaError(f"{path} names {count} files: expected at most {MAX_SHARDS}")
    return weight_map


def read_shards(index: Path, suffix: str, read: Callable[[Path], dict[str, FileTensor]]) -> dict[str, FileTensor]:
    """The tensors that an index lists, shard by shard, each read by `read`.

    Raises MinisaError for a shard that is missing or lacks what the index says it holds, and as read_weight_map does.
    """
    weight_map = read_weight_map(index, suffix)
    tensors: dict[str, FileTensor] = {}
    for shard in sorted(set(weight_map.values())):
        path = index.with_name(shard)
        if not path.is_file():
            raise MinisaError(f"{path}: missing, and {index.name} lists it: fetch it as well")
        tensors |= {name: tensor for name, tensor in read(path).items() if weight_map.get(name) == shard}
    if lacking := min(weight_map.keys() - tensors.keys(), default=None):
        path = index.with_name(weight_map[lacking])
        raise MinisaError(f"{path}: lacks {lacking!r}, which {index.name} says it holds")
    return tensors


@dataclass(frozen=True, slots=True)
class MergedTensor:
    """A tensor whose rows (dim 0) or columns (dim 1) are divided among ranks."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[FileTensor, ...]
    dim: int

    def read_rows(self, start: int, stop: int) -> torch.Tensor:
        if self.dim == 1:
            return torch.cat([part.read_rows(start, stop) for part in self.parts], dim=1)
        rows = self.parts[0].shape[0]  # of each part
        spans = [(max(start - i * rows, 0), min(stop - i * rows, rows)) for i in range(len(self.parts))]
        return torch.cat(
            [part.read_rows(*span) for part, span in zip(self.parts, spans, strict=True) if span[0] < span[1]]
        )


def merge(ranks: list[dict[str, FileTensor]], width: Any) -> dict[str, FileTensor | MergedTensor]:
    """One model out of its ranks' tensors; `width` is what params.json gives as the model's dim.

    Embeddings are divided by columns in Llama 2 and by rows in Llama 3, which their shape tells.
    Raises MinisaError when the files are not parts of one model.
    """
    first, *others = ranks
    for other in others:
        if unpaired := min(first.keys() ^ other.keys(), default=None):
            path = (first | other)[unpaired].file.path
            raise MinisaError(f"{path}: {unpaired!r} is not in every shard: are they of one model?")
    if not others:
        return dict(first)
    return {name: _merged(name, tuple(rank[name] for rank in ranks), width) for name in first}


def _merged(name: str, parts: tuple[FileTensor, ...], width: Any) -> FileTensor | MergedTensor:
    first = parts[0]
    for part in parts:
        if (part.shape, part.dtype) != (first.shape, first.dtype):
            raise MinisaError(
                f"{part.file.path}: {part.name!r} has shape {list(part.shape)}, and {list(first.shape)} in "
                f"{first.file.path.name}: expected shards of one size"
            )
    if len(first.shape) != 2:
        return first  # norms are in every rank
    module = name.removesuffix(".weight").rpartition(".")[2]
    dim = _SPLIT_DIM.get(module, 0 if first.shape[1] == width else 1)
    shape = tuple(size * len(parts) if i == dim else size for i, size in enumerate(first.shape))
    return MergedTensor(first.name, shape, parts, dim)
