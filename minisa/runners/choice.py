"""The one place that chooses what runs a model."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import subprocess

import torch

from minisa.attention import REFERENCE, TORCH, AttentionBackend
from minisa.config import ModelConfig
from minisa.device import named_dtype
from minisa.errors import MinisaError
from minisa.generation.runner import Runner
from minisa.model import Transformer
from minisa.runners.eager import TorchRunner
from minisa.runners.graphs import GraphRunner
from minisa.runners.native.build import open_library
from minisa.runners.native.runner import NativeRunner, supports


def find_backend(name: str | None, device: torch.device) -> AttentionBackend:
    """Attention called reference, torch or kernels; None is the fastest for the device.

    Raises MinisaError for another name, and for the kernels where Triton or a GPU is missing.
    """
    has_triton = importlib.util.find_spec("triton") is not None
    if name is None:
        name = "kernels" if device.type == "cuda" and has_triton else "torch"
    if name == "kernels":
        if not has_triton:
            raise MinisaError("backend 'kernels' needs Triton: pip install triton, or take backend 'torch'")
        if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            raise MinisaError(f"backend 'kernels' is for CUDA, the device is {device}: leave it out, or take 'torch'")
        from minisa.runners.kernels.decode_attention import KERNELS

        return KERNELS
    if name not in ("reference", "torch"):
        raise MinisaError(f"backend {name!r} is not one: expected reference, torch or kernels")
    return TORCH if name == "torch" else REFERENCE


def native_library(
    config: ModelConfig, device: torch.device, compile: bool | None, dtype: str | torch.dtype = "auto"
) -> ctypes.CDLL | None:
    """The C++ step for a bf16 or quantized model, built now if need be.

    dtype: what the user asked for; the step is for bf16. None where it does not fit the model, is not wanted or cannot
    be built.
    """
    if device.type != "cpu" or compile is False or not supports(config):
        return None
    return open_library() if dtype == "auto" or named_dtype(dtype) == torch.bfloat16 else None


def choose_runner(model: Transformer, compile: bool | None = None, library: ctypes.CDLL | None = None) -> Runner:
    """The fastest runner for a loaded model.

    compile: None for CUDA graphs with Triton's kernels on a GPU, and on a CPU the C++ step where it fits, else eager
        PyTorch. True for torch.compile in place of eager. False for eager anywhere.
    library: from native_library.
    The weights move out of the model into the C++ step's own layout.
    """
    weight = model.norm.weight
    if model.backend.name == "kernels" and weight.is_cuda:
        from minisa.runners.kernels.quantized_product import use_kernels  # Triton is not installed everywhere

        use_kernels(model)
        if compile is not False:
            return GraphRunner(model)
    if library is not None and weight.dtype == torch.bfloat16:
        return NativeRunner(model, library)
    if weight.device.type == "cpu" and compile is not False and not _works(os.environ.get("CXX") or "g++"):
        return TorchRunner(model, name="eager (no C++ compiler)")
    return TorchRunner(model, compile=compile is True)


@functools.cache
def _works(compiler: str) -> bool:
    """Whether torch.compile, which takes $CXX for one word, can compile C++ for a CPU here."""
    command = [compiler, "-x", "c++", "-fsyntax-only", "-"]
    try:
        return subprocess.run(command, input=b"#include <cmath>", capture_output=True, check=False).returncode == 0
    except OSError:
        return False
