"""Where a healing is, and the file in which it is kept, so that one broken off can go on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minisa.checkpoint.safetensors import read_safetensors, write_safetensors
from minisa.errors import MinisaError
from minisa.study.resuming import require_same_settings

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

    def require_fit(self, parameters: Mapping[str, Tensor]) -> None:
        """MinisaError where it is of other parameters than these."""
        for name, tensor in (item for kind in _TENSORS for item in getattr(self, kind).items()):
            if name not in parameters or parameters[name].shape != tensor.shape:
                raise MinisaError(
                    f"the healing to go on with has {name} {list(tensor.shape)}, which this model does not train: "
                    "remove its state to begin again"
                )


def read_training(path: Path, settings: Mapping[str, Any]) -> Training:
    """What an earlier run left. MinisaError if that was of other settings, naming one, or if the file is broken."""
    if not path.exists():
        return Training()
    try:
        tensors = {name: stored.read_rows(0, stored.shape[0]) for name, stored in read_safetensors(path).items()}
        record = json.loads(tensors.pop(_RECORD).numpy().tobytes())
        before = dict(record["settings"])
        training = Training(int(record["step"]), float(record["seconds"]), float(record["best"]))
        training.history = [(int(step), float(divergence)) for step, divergence in record["history"]]
        for name, tensor in tensors.items():
            kind, parameter = name.split("/")
            if kind not in _TENSORS:
                raise ValueError(f"it has {name}")
            getattr(training, kind)[parameter] = tensor.float()
    except (MinisaError, OSError, ValueError, LookupError, TypeError, OverflowError, RecursionError) as error:
        raise MinisaError(f"{path}: not what a healing leaves ({error}): remove it to begin again") from error
    require_same_settings(path, before, settings)
    return training


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
