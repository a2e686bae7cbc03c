"""A plan's delta: weights that take the place of the checkpoint's, in a safetensors file beside the plan.

Tensors carry the model's own parameter names, such as layers.21.attention.wo.weight, and its shapes, in fp32, bf16 or
fp16. They are read like any other tensor of the checkpoint, so every dtype, quantization and runner takes them. Rows of
wq and wk are in the model's order, whatever the checkpoint's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from minisa.checkpoint.layouts import Checkpoint
from minisa.checkpoint.safetensors import read_safetensors, write_safetensors
from minisa.errors import MinisaError
from minisa.files import sha256_of
from minisa.sharing import Delta

STORED = torch.bfloat16


def with_delta(checkpoint: Checkpoint, delta: Delta) -> Checkpoint:
    """The checkpoint with the delta's tensors in the place of its own.

    Raises MinisaError where the file is missing, is not the one the plan was saved with, or does not fit the model.
    """
    try:
        found = sha256_of(delta.path)
        tensors = read_safetensors(delta.path)
    except OSError as error:
        raise MinisaError(f"{delta.path}: cannot read the plan's weights: {error.strerror}") from error
    if found != delta.sha256:
        raise MinisaError(
            f"{delta.path}: sha256 {found[:12]}… is not the plan's {delta.sha256[:12]}…: "
            "take the file that was written with the plan"
        )
    for name, tensor in tensors.items():
        own = checkpoint.tensors.get(name)
        if own is None:
            raise MinisaError(f"{delta.path}: {name!r} is no weight a plan can replace: expected {checkpoint.path}'s")
        tensor.require_weight_dtype()
        if own.shape != tensor.shape:
            raise MinisaError(
                f"{delta.path}: {name} is {list(tensor.shape)}, the model's is {list(own.shape)}: "
                "the plan was made for another model"
            )
    return replace(checkpoint, tensors={**checkpoint.tensors, **tensors}, replaced=frozenset(tensors))


def as_stored(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors rounded as write_delta rounds them unless told otherwise."""
    return {name: tensor.to(STORED).to(tensor.dtype) for name, tensor in tensors.items()}


def write_delta(path: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype = STORED) -> Delta:
    """Write the tensors in dtype; what a plan then points to."""
    write_safetensors(path, {name: tensor.to(dtype) for name, tensor in tensors.items()})
    return Delta(path.resolve(), sha256_of(path))
