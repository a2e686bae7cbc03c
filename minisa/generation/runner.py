"""stub"""
from __future__ import annotations
from typing import Any
from collections.abc import Callable
from torch import Tensor
Runner = Any
Step = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]
