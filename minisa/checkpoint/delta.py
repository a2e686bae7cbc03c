"""A plan's delta: weights that take the place of the checkpoint's, in a safetensors file beside the plan.

Tensors carry the model's own parameter names, such as layers.21.attention.wo.weight, and its shapes, in fp32, bf16 or
fp16. They are read like any other tensor of the checkpoint, so every dtype, quantization and runner takes them. wq and
wk cannot be replaced: their rows lie in the checkpoint's own order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from minisa.checkpoint.layouts import Checkpoint
from minisa.checkpoint.safetensors import read_safetensors, write_safetensors
from minisa.errors import MinisaError
from minisa.sharing import Delta


def with_delta(checkpoint: Checkpoint, delta: Delta) -> Checkpoint:
    """The checkpoint with the delta's tensors in the place of its own.

    Raises MinisaError where the file is missing, is not the one the plan was saved with, or does not fit the model.
    """
    try:
        found = _sha256(delta.path)
        tensors = read_safetensors(delta.path)
    except OSError as error:
        raise MinisaError(f"{delta.path}: cannot read the plan's weights: {error.strerror}") from error
    if found != delta.sha256:
        raise MinisaError(
            f"{delta.path}: sha256 {found[:12]}… is not the plan's {delta.sha256[:12]}…: "
            "take the file that was written with the plan"
        )
    for name, tensor in tensors.items():
        tensor.require_weight_dtype()
        own = checkpoint.tensors.get(name)
        if own is None or name.endswith(("attention.wq.weight", "attention.wk.weight")):
            raise MinisaError(f"{delta.path}: {name!r} is no weight a plan can replace: expected {checkpoint.path}'s")
        if own.shape != tensor.shape:
            raise MinisaError(
                f"{delta.path}: {name} is {list(tensor.shape)}, the model's is {list(own.shape)}: "
                "the plan was made for another model"
            )
    return replace(checkpoint, tensors={**checkpoint.tensors, **tensors})


def write_delta(path: Path, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype = torch.bfloat16) -> Delta:
    """Write the tensors in dtype; what a plan then points to."""
    write_safetensors(path, {name: tensor.to(dtype) for name, tensor in tensors.items()})
    return Delta(path.resolve(), _sha256(path))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
