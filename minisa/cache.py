"""StaticCache: keys for leaders only, values for every layer, allocated once."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from minisa.config import ModelConfig
from minisa.errors import MinisaError
from minisa.sharing import SharingPlan

FP8_MAX = torch.finfo(torch.float8_e4m3fn).max


@dataclass(frozen=True, slots=True)
class StaticCache:
    """Keys [n_leaders, B, n_kv_heads, S, head_dim] and values [n_layers, B, n_kv_heads, S, head_dim].

    A worked example: 4 layers, spans "1:2-3", 2 rows of 100 tokens.

        layer        0    1    2    3
        key_slots    0    1    –    –      keys    [2, 2, Hkv, 100, D]: layers 2 and 3 own no key memory at all
        values       0    1    2    3      values  [4, 2, Hkv, 100, D]

    Slot s of a row holds the token at position s. `view` narrows the cache to some rows and to the first slots;
    a view shares the memory, and attention reads exactly the slots of the view it is given: that is how the
    cost of a step grows with the context in use and not with max_seq_len. Slots not yet written hold zeros, or
    what an earlier, longer text left there; no position ever attends to a later slot, so neither is seen.

    Of dtype fp32, fp16, bf16 or fp8 (torch.float8_e4m3fn); what is written is rounded to it.
    """

    keys: Tensor
    values: Tensor
    key_slots: tuple[int | None, ...]  # for each layer, its index in `keys`; None for a follower

    @classmethod
    def allocate(
        cls,
        config: ModelConfig,
        plan: SharingPlan,
        *,
        batch: int = 1,
        max_seq_len: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> StaticCache:
        shape = (batch, config.n_kv_heads, max_seq_len, config.head_dim)
        slot_of = {layer: slot for slot, layer in enumerate(plan.leaders)}
        return cls(
            keys=_zeros((len(plan.leaders), *shape), device, dtype),
            values=_zeros((plan.n_layers, *shape), device, dtype),
            key_slots=tuple(slot_of.get(layer) for layer in range(plan.n_layers)),
        )

    @property
    def batch(self) -> int:
        return self.values.shape[1]

    @property
    def length(self) -> int:
        """Slots a row of this cache (or of this view)."""
        return self.values.shape[3]

    def view(self, length: int | None = None, rows: slice = slice(None)) -> StaticCache:
        """The first `length` slots of some rows; the memory is shared.

        Raises MinisaError where the cache is shorter than that: it never wraps.
        """
        length = self.length if length is None else length
        if length > self.length:
            raise MinisaError(
                f"{length} tokens do not fit a cache of {self.length}: raise max_seq_len or shorten the text"
            )
        return StaticCache(self.keys[:, rows, :, :length], self.values[:, rows, :, :length], self.key_slots)

    def copy_(self, other: StaticCache) -> None:
        """Take over another's slots; of the same model, plan and length, and of as many rows or one for all."""
        self.keys.copy_(other.keys)
        self.values.copy_(other.values)

    def update_keys(self, layer: int, positions: Tensor, k: Tensor) -> Tensor:
        """Write a leader's k [B, n_kv_heads, T, D] at positions [B, T]; returns its keys [B, n_kv_heads, S, D]."""
        slot = self.key_slots[layer]
        assert slot is not None, f"layer {layer} follows and has no keys"
        return _write(self.keys[slot], positions, k)

    def update_values(self, layer: int, positions: Tensor, v: Tensor) -> Tensor:
        """Write a layer's v [B, n_kv_heads, T, D] at positions [B, T]; returns its values [B, n_kv_heads, S, D]."""
        return _write(self.values[layer], positions, v)

    def bytes(self) -> int:
        """Bytes of the storage behind the tensors; `costs.kv_bytes` is the formula it must equal."""
        return self.keys.untyped_storage().nbytes() + self.values.untyped_storage().nbytes()


def _zeros(shape: tuple[int, ...], device: torch.device | str, dtype: torch.dtype) -> Tensor:
    """Zeros, since a weight of 0 times a NaN left in fresh memory would be NaN.

    On the CPU by way of numpy, whose zeros take no memory until they are written to: torch's own are resident at once.
    """
    n_bytes = math.prod(shape) * dtype.itemsize
    if torch.device(device).type == "cpu":
        memory = torch.from_numpy(np.zeros(n_bytes, np.uint8))
    else:
        memory = torch.zeros(n_bytes, dtype=torch.uint8, device=device)
    return memory.view(dtype).view(shape)


def _write(stored: Tensor, positions: Tensor, new: Tensor) -> Tensor:
    """Raises torch's own error for a position outside the stored slots (a device assert on CUDA)."""
    memory, new = stored, to_dtype(new, stored.dtype)
    if stored.dtype == torch.float8_e4m3fn:  # which torch cannot scatter
        memory, new = stored.view(torch.uint8), new.view(torch.uint8)
    if len(positions) == 1:
        memory.index_copy_(2, positions[0], new)
    else:
        memory.scatter_(2, positions[:, None, :, None].expand_as(new), new)
    return stored


def to_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in dtype; in fp8 its largest number stands for all beyond, where torch has NaN."""
    if dtype == torch.float8_e4m3fn:
        x = x.clamp(-FP8_MAX, FP8_MAX)
    return x.to(dtype)
