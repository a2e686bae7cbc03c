"""stub"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

Runner = Any
Step = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]
