"""Plan files as the studies write them: the plan, its weights if it has some, and how it was made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from minisa.checkpoint import open_checkpoint, with_delta, write_delta
from minisa.checkpoint.safetensors import read_safetensors
from minisa.config import ModelConfig
from minisa.costs import kv_bytes
from minisa.device import dtype_name
from minisa.engine import LLM
from minisa.errors import MinisaError
from minisa.models.registry import choose_plan, resolve
from minisa.sharing import SharingPlan
from minisa.study.text import sha256_of


def read_plan(model: str, sa: str) -> tuple[SharingPlan, dict[str, Tensor]]:
    """What --sa names for --model, and the weights it brings, in fp32 by parameter name.

    Raises MinisaError where it does not fit, or where nothing follows.
    """
    path, entry = resolve(model)
    checkpoint = open_checkpoint(path)
    plan = choose_plan(sa, checkpoint.config, entry)
    if not plan.followers:
        raise MinisaError(f"--sa {sa}: no layer follows, so there is nothing to make up for: name a plan")
    if plan.delta is None:
        return plan, {}
    with_delta(checkpoint, plan.delta)  # for what it checks
    stored = read_safetensors(plan.delta.path)
    return plan, {name: tensor.read_rows(0, tensor.shape[0]).float() for name, tensor in stored.items()}


def save_plan(plan: SharingPlan, path: Path, made: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    """Write the plan and, beside it, weights if there are any (by parameter name, in bf16) as
    NAME.delta.safetensors: NAME.safetensors may be a checkpoint's."""
    try:
        delta = write_delta(path.with_suffix(".delta.safetensors"), weights) if weights else None
        SharingPlan(plan.sources, plan.head_maps, delta).save(path, made)
    except OSError as error:
        raise MinisaError(f"--out {path}: cannot write the plan: {error.strerror}") from error


def provenance(model: str, texts: Sequence[str], **figures: Any) -> dict[str, Any]:
    """What stands under "made" in a plan file: the model, the texts with their sha256, settings and results."""
    named = [{"file": Path(text).name, "sha256": sha256_of(text)} for text in texts]
    return {"model": Path(model).name, "texts": named, **figures}


def text_settings(llm: LLM, model: str, text: str, windows: Tensor, quantize: str | None) -> dict[str, Any]:
    """The settings in the record of what was measured on windows [N, length] of a text."""
    path, entry = resolve(model)
    return {
        "model": entry.name if entry is not None else path.name,
        "dtype": dtype_name(llm.dtype),
        "quantize": quantize,
        "text_sha256": sha256_of(text),
        "windows": len(windows),
        "length": windows.shape[1],
    }


def kv_saved(config: ModelConfig, plan: SharingPlan) -> float:
    """The share of the KV cache that a plan saves: n/(2L)."""
    return 1 - kv_bytes(config, plan, 1, 2) / kv_bytes(config, SharingPlan.none(config.n_layers), 1, 2)
