"""StaticCache: keys for leaders only, values for every layer, allocated once."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from minisa.config import ModelConfig
from minisa.costs import cache_slots
from minisa.errors import MinisaError
from minisa.sharing import SharingPlan

MOST_BYTES = 1 << 48  # what a process can address
FP8_MAX = torch.finfo(torch.float8_e4m3fn).max


@dataclass(frozen=True, slots=True)
class StaticCache:
    """Keys [n_leaders, B, n_kv_heads, S, head_dim] and values [n_layers, B, n_kv_heads, S, head_dim].

    A worked example: 4 layers, spans "1:2-3", 2 rows of 100 tokens.

        layer        0    1    2    3
        key_index    0    1    –    –      keys    [2, 2, Hkv, 100, D]: layers 2 and 3 own no key memory at all
        values       0    1    2    3      values  [4, 2, Hkv, 100, D]

    Slot s of a row holds the token at position s. `view` narrows the cache to some rows and to the first positions;
    a view shares the memory, and attention reads exactly the slots of the view it is given: that is how the
    cost of a step grows with the context in use and not with max_seq_len. Slots not yet written hold zeros, or
    what an earlier, longer text left there; no position ever attends to a later slot, so neither is seen.

    Of a model with a sliding window the slots are a ring: position p lies in slot p % S, where S is the window and
    `costs.SLACK` more. With a window of 3 and, for once, a slack of 2, after 7 tokens and before the next:

        slot         0    1    2    3    4
        position     5    6    2    3    4     the token at position 7 goes to slot 2 and attends to 5, 6 and itself

    Of dtype fp32, fp16, bf16 or fp8 (torch.float8_e4m3fn); what is written is rounded to it.
    """

    keys: Tensor
    values: Tensor
    key_index: tuple[int | None, ...]  # for each layer, its index in `keys`; None for a follower
    length: int  # positions a row of this cache (or of this view) may take: in a ring more than its slots

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
        ring: bool = True,
    ) -> StaticCache:
        """For max_seq_len tokens a row. ring: False keeps every token, seen or not, in the slot of its position.

        Raises MinisaError for more than any machine has memory for.
        """
        slots = cache_slots(config, max_seq_len) if ring else max_seq_len
        shape = (batch, config.n_kv_heads, slots, config.head_dim)
        index_of = {layer: index for index, layer in enumerate(plan.leaders)}
        return cls(
            keys=_zeros((len(plan.leaders), *shape), device, dtype),
            values=_zeros((plan.n_layers, *shape), device, dtype),
            key_index=tuple(index_of.get(layer) for layer in range(plan.n_layers)),
            length=max_seq_len,
        )

    @property
    def batch(self) -> int:
        return self.values.shape[1]

    @property
    def slots(self) -> int:
        """Slots a row of this cache (or of this view)."""
        return self.values.shape[3]

    @property
    def wraps(self) -> bool:
        """Whether positions lie in the slots as in a ring; else each lies in the slot of its number."""
        return self.slots < self.length

    def view(self, length: int | None = None, rows: slice = slice(None)) -> StaticCache:
        """The first `length` positions of some rows; the memory is shared.

        Raises MinisaError where the cache is for fewer than that.
        """
        length = self.length if length is None else length
        if length > self.length:
            raise MinisaError(
                f"{length} tokens do not fit a cache of {self.length}: raise max_seq_len or shorten the text"
            )
        return StaticCache(self.keys[:, rows, :, :length], self.values[:, rows, :, :length], self.key_index, length)

    def copy_(self, other: StaticCache) -> None:
        """Take over another's slots; of the same model, plan and slots, and of as many rows or one for all."""
        self.keys.copy_(other.keys)
        self.values.copy_(other.values)

    def update_keys(self, layer: int, positions: Tensor, k: Tensor) -> Tensor:
        """Write a leader's k [B, n_kv_heads, T, D] at positions [B, T]; returns its keys [B, n_kv_heads, S, D].

        Of a ring they come in the order of its slots where T is 1. Where T > 1 the positions, the same in every row,
        are the view's last, and the keys a copy in the order of positions.
        """
        index = self.key_index[layer]
        assert index is not None, f"layer {layer} follows and has no keys"
        return self._update(self.keys[index], positions, k)

    def update_values(self, layer: int, positions: Tensor, v: Tensor) -> Tensor:
        """As update_keys, for the v [B, n_kv_heads, T, D] of any layer."""
        return self._update(self.values[layer], positions, v)

    def as_read(self, positions: Tensor) -> tuple[Tensor, int, bool]:
        """What updates at positions [B, T] return, as attention wants to know it: the positions counted from its first
        slot, how many slots it has, and whether these are a ring."""
        n_new = positions.shape[1]
        if not self.wraps or n_new == 1:
            return positions, self.slots, self.wraps
        first = self._first_kept(n_new)
        return positions - first, self.length - first, False

    def _first_kept(self, n_new: int) -> int:
        """The earliest position still in a ring when the last n_new of this view come."""
        return max(self.length - n_new - self.slots, 0)

    def _update(self, stored: Tensor, positions: Tensor, new: Tensor) -> Tensor:
        n_new, slots = new.shape[2], self.slots
        if not self.wraps:
            _write(stored, positions, new)
        elif n_new == 1:
            _write(stored, positions % slots, new)
        else:
            # The first of these tokens still see what the last of them write over: read, then write.
            before = torch.arange(self._first_kept(n_new), self.length - n_new, device=stored.device) % slots
            read = torch.cat((_bits(stored)[:, :, before], _bits(to_dtype(new, stored.dtype))), dim=2)
            _write(stored, positions[:, -slots:] % slots, new[:, :, -slots:])
            return read.view(stored.dtype)
        return stored

    def bytes(self) -> int:
        """Bytes of the storage behind the tensors; `costs.kv_bytes` is the formula it must equal."""
        return self.keys.untyped_storage().nbytes() + self.values.untyped_storage().nbytes()


def _zeros(shape: tuple[int, ...], device: torch.device | str, dtype: torch.dtype) -> Tensor:
    """Zeros, since a weight of 0 times a NaN left in fresh memory would be NaN.

    On the CPU by way of numpy, whose zeros take no memory until they are written to: torch's own are resident at once.
    """
    n_bytes = math.prod(shape) * dtype.itemsize
    if n_bytes > MOST_BYTES:
        raise MinisaError(
            f"a cache of {shape[1]} rows of {shape[3]} tokens fits no machine: lower the batch or the length"
        )
    if torch.device(device).type == "cpu":
        memory = torch.from_numpy(np.zeros(n_bytes, np.uint8))
    else:
        memory = torch.zeros(n_bytes, dtype=torch.uint8, device=device)
    return memory.view(dtype).view(shape)


def _write(stored: Tensor, slots: Tensor, new: Tensor) -> None:
    """Raises torch's own error for a slot that is not stored (a device assert on CUDA)."""
    memory, new = _bits(stored), _bits(to_dtype(new, stored.dtype))
    if len(slots) == 1:
        memory.index_copy_(2, slots[0], new)
    else:
        memory.scatter_(2, slots[:, None, :, None].expand_as(new), new)


def _bits(x: Tensor) -> Tensor:
    """fp8 as bytes, which torch can index and scatter."""
    return x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x


def to_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in dtype; in fp8 its largest number stands for all beyond, where torch has NaN."""
    if dtype == torch.float8_e4m3fn:
        x = x.clamp(-FP8_MAX, FP8_MAX)
    return x.to(dtype)
