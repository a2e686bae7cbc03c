"""Weights in several files, with an index that says which of them holds which tensor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from minisa.checkpoint.files import FileTensor
from minisa.errors import MinisaError, shown
from minisa.files import is_plain_name, read_json

MAX_SHARDS = 1024


def read_weight_map(path: Path, suffix: str = ".safetensors") -> dict[str, str]:
    """From each tensor's name to its file, as an index has them (model.safetensors.index.json).

    Format: huggingface.co/docs/safetensors. Raises MinisaError where it is not of that form, names anything but plain
    files of that suffix beside it, or more than MAX_SHARDS of them; OSError where it cannot be read.
    """
    weight_map = read_json(path).get("weight_map") or {}
    if not isinstance(weight_map, dict) or {type(shard) for shard in weight_map.values()} != {str}:
        raise MinisaError(f"{path}: weight_map is missing or broken: expected tensor names with their files")
    shards = sorted(set(weight_map.values()))
    if len(shards) > MAX_SHARDS:
        raise MinisaError(f"{path} names {len(shards)} files: expected at most {MAX_SHARDS}")
    for shard in shards:
        if not (is_plain_name(shard) and shard.endswith(suffix)):
            raise MinisaError(f"{path}: weight_map names {shown(shard)}: expected plain {suffix} file names")
    return weight_map


def read_shards(index: Path, suffix: str, read: Callable[[Path], dict[str, FileTensor]]) -> dict[str, FileTensor]:
    """The tensors that an index lists, shard by shard, each read by `read`.

    Raises MinisaError for a shard that is missing or lacks what the index says it holds, and as read_weight_map does.
    """
    listed_in: dict[str, set[str]] = {}
    for name, shard in read_weight_map(index, suffix).items():
        listed_in.setdefault(shard, set()).add(name)
    tensors: dict[str, FileTensor] = {}
    for shard, listed in sorted(listed_in.items()):
        if not index.with_name(shard).is_file():
            raise MinisaError(f"{index.with_name(shard)}: missing, and {index.name} lists it: fetch it as well")
        stored = read(index.with_name(shard))
        if lacking := min(listed - stored.keys(), default=None):
            raise MinisaError(f"{index.with_name(shard)}: lacks {lacking!r}, which {index.name} says it holds")
        tensors.update({name: tensor for name, tensor in stored.items() if name in listed})
    return tensors
