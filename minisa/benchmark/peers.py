"""Who minisa can be compared with, and whether that makes sense here."""

from __future__ import annotations

import importlib.util

import torch

from minisa.benchmark.contender import Opening
from minisa.checkpoint.names import Naming
from minisa.errors import MinisaError

PEERS = {"transformers": ("transformers",), "llama.cpp": ("xllamacpp", "llama_cpp")}  # and the packages that bring each


def check_peer(name: str, opening: Opening) -> None:
    """Raises MinisaError where the peer is not installed or cannot do the same work."""
    if not any(importlib.util.find_spec(package) for package in PEERS[name]):
        raise MinisaError(f'--against {name}: not installed; pip install "minisa[peers]"')
    if name != "llama.cpp":
        return
    if importlib.util.find_spec("gguf") is None:
        raise MinisaError(f'--against {name}: needs the gguf package too; pip install "minisa[peers]"')
    if opening.device.type != "cpu":
        raise MinisaError(f"--against {name}: compares on the CPU only; add --device cpu")
    if opening.quantize is None and opening.dtype == torch.float16:
        raise MinisaError(f"--against {name}: compares fp32, bf16, int8 and int4; leave out --dtype fp16")
    window = opening.config.sliding_window
    if window is not None and opening.context > window:
        raise MinisaError(
            f"--against {name}: it ignores the sliding window of {window} tokens; stay below that with --contexts"
        )


def foreign_name(parameter: str, naming: Naming, layers: str) -> str:
    """What a format calls one of our parameters; `layers` is what it puts before a layer's number."""
    stem = parameter.removesuffix(".weight")
    table, prefix = naming.outside, ""
    if stem.startswith("layers."):
        _, number, stem = stem.split(".", 2)
        table, prefix = naming.inside, f"{layers}{number}."
    return prefix + next(theirs for theirs, ours in table.items() if ours == stem) + ".weight"
