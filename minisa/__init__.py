"""minisa: a compact inference engine for Llama and Mistral checkpoints with Shared Attention (arXiv 2407.12866)."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minisa.engine import LLM, MinisaError, SharingPlan, load

__all__ = ["LLM", "MinisaError", "SharingPlan", "load"]


def __getattr__(name: str) -> Any:
    """PyTorch is loaded with the first of these names, so that a command line can see to Ctrl-C before that."""
    if name not in __all__:
        raise AttributeError(f"module 'minisa' has no attribute {name!r}")
    return getattr(import_module("minisa.engine"), name)


def __dir__() -> list[str]:
    return __all__
