"""Where a healing is, and the file in which it is kept, so that one broken off can go on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minisa.checkpoint.files import StoredTensor
from minisa.checkpoint.safetensors import read_safetensors, write_safetensors
from minisa.errors import MinisaError
from minisa.files import MAX_JSON, parse_json
from minisa.study.resuming import left_by, require_same_settings

MOMENTS = ("exp_avg", "exp_avg_sq")  # of Adam, as torch.optim calls them
_TENSORS = ("weights", "best_weights", *MOMENTS)
_RECORD = "record"  # the rest, a JSON object as bytes, among the tensors of the file


@dataclass(slots=True)
class Training:
    """What a run that is broken off leaves for the next. Tensors go by the names of the trained parameters."""

    step: int = 0
    seconds: float = 0.0
    best: float = float("inf")  # divergence on held-out text, nats a token
    history: list[tuple[int, float]] = field(default_factory=list)  # (step, divergence)
    weights: dict[str, Tensor] = field(default_factory=dict)  # as trained so far
    best_weights: dict[str, Tensor] = field(default_factory=dict)
    exp_avg: dict[str, Tensor] = field(default_factory=dict)
    exp_avg_sq: dict[str, Tensor] = field(default_factory=dict)


def read_training(path: Path, settings: Mapping[str, Any], parameters: Mapping[str, Tensor]) -> Training:
    """What an earlier run left. parameters: those that are trained, by name.

    Raises MinisaError if the run was of other settings, naming one, or of other parameters, or if the file is broken.
    """
    if not path.exists():
        return Training()
    with left_by("a healing", path):
        tensors = read_safetensors(path)
        record = _record(tensors.pop(_RECORD))
        before = dict(record["settings"])
        training = Training(int(record["step"]), float(record["seconds"]), float(record["best"]))
        training.history = [(int(step), float(divergence)) for step, divergence in record["history"]]
    require_same_settings(path, before, settings)
    wanted = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    for kind in _TENSORS:
        stored = {name: tensors.pop(f"{kind}/{name}") for name in wanted if f"{kind}/{name}" in tensors}
        absent = not stored and (kind == "best_weights" or not training.step)
        if not absent and {name: tensor.shape for name, tensor in stored.items()} != wanted:
            raise MinisaError(f"{path}: {kind} are not those of this model: remove it to begin again")
        with left_by("a healing", path):
            kept = {name: tensor.read_rows(0, tensor.shape[0]).float() for name, tensor in stored.items()}
        setattr(training, kind, kept)
    if tensors:
        raise MinisaError(f"{path}: {min(tensors)} is nothing this model trains: remove it to begin again")
    return training


def _record(stored: StoredTensor) -> dict[str, Any]:
    if len(stored.shape) != 1 or stored.shape[0] > MAX_JSON:
        raise ValueError(f"a record of shape {stored.shape}")
    return parse_json(stored.read_rows(0, stored.shape[0]).numpy().tobytes(), _RECORD)


def write_training(path: Path, settings: Mapping[str, Any], training: Training) -> None:
    """Keep where the training is, whole at every moment."""
    record = {name: getattr(training, name) for name in ("step", "seconds", "best", "history")}
    tensors = {f"{kind}/{name}": tensor for kind in _TENSORS for name, tensor in getattr(training, kind).items()}
    text = json.dumps({"settings": settings, **record}).encode()
    tensors[_RECORD] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    try:
        write_safetensors(path, tensors)
    except OSError as error:
        raise MinisaError(f"{path}: cannot keep the state of the training: {error.strerror}") from error
