"""The static KV cache: keys for leaders only, values for every layer, allocated once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from minisa.config import ModelConfig
from minisa.costs import SLACK, cache_slots
from minisa.errors import MinisaError
from minisa.sharing import SharingPlan

FP8_MAX = torch.finfo(torch.float8_e4m3fn).max
WRITTEN_AHEAD = 16  # positions, at most, that a step may have written past a row's last token: wrong guesses


@dataclass(frozen=True, slots=True)
class StaticCache:
    """Keys [n_leaders, B, n_kv_heads, S, head_dim] and values [n_layers, B, n_kv_heads, S, head_dim].

    A worked example: 4 layers, spans "1:2-3", 2 rows of 100 tokens.

        layer        0    1    2    3
        key_index    0    1    –    –      keys    [2, 2, Hkv, 100, D]: layers 2 and 3 own no key memory at all
        values       0    1    2    3      values  [4, 2, Hkv, 100, D]

    Slot s of a row holds the token at position s. `view` narrows the cache to some rows and to the first positions; a
    view shares the memory, and attention reads exactly the slots of the view it is given: the cost of a step grows
    with the context in use, not with max_seq_len. Slots not yet written hold zeros, or what an earlier, longer text
    left there; no position attends to a later slot, so neither is seen.

    The dtype is fp32, fp16, bf16 or fp8 (torch.float8_e4m3fn); what is written is rounded to it.
    """

    keys: Tensor
    values: Tensor
    key_index: tuple[int | None, ...]  # for each layer, its index in `keys`; None for a follower
    length: int  # positions a row of this cache (or view) may take
    tokens: list[list[int]]  # for each row, the ids whose keys and values it holds

    wraps: ClassVar[bool] = False  # whether positions share slots, as in a RingCache

    @staticmethod
    def allocate(
        config: ModelConfig,
        plan: SharingPlan,
        *,
        batch: int = 1,
        max_seq_len: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        ring: bool = True,
    ) -> StaticCache:
        """Room for max_seq_len tokens a row; a RingCache where the model's sliding window is shorter than that.

        ring: False keeps every token, seen or not, in the slot of its position.
        """
        slots = cache_slots(config, max_seq_len) if ring else max_seq_len
        shape = (batch, config.n_kv_heads, slots, config.head_dim)
        index_of = {layer: index for index, layer in enumerate(plan.leaders)}
        kind = RingCache if slots < max_seq_len else StaticCache
        return kind(
            keys=_zeros((len(plan.leaders), *shape), device, dtype),
            values=_zeros((plan.n_layers, *shape), device, dtype),
            key_index=tuple(index_of.get(layer) for layer in range(plan.n_layers)),
            length=max_seq_len,
            tokens=[[] for _ in range(batch)],
        )

    @property
    def batch(self) -> int:
        return self.values.shape[1]

    @property
    def slots(self) -> int:
        """Slots a row of this cache (or view)."""
        return self.values.shape[3]

    def bytes(self) -> int:
        """Bytes of the storage behind the tensors; `costs.kv_bytes` is the formula it must equal."""
        return self.keys.untyped_storage().nbytes() + self.values.untyped_storage().nbytes()

    def view(self, length: int | None = None, rows: slice = slice(None)) -> StaticCache:
        """The first `length` positions of some rows; the memory and the rows' tokens are shared.

        Raises MinisaError where the cache is for fewer positions.
        """
        length = self.length if length is None else length
        if length > self.length:
            raise MinisaError(
                f"{length} tokens do not fit a cache of {self.length}: raise max_seq_len or shorten the text"
            )
        kind = RingCache if self.slots < length else StaticCache
        keys, values = self.keys[:, rows, :, :length], self.values[:, rows, :, :length]
        return kind(keys, values, self.key_index, length, self.tokens[rows])

    def copy_(self, other: StaticCache) -> None:
        """Take over another's slots: same model, plan and number of slots; as many rows, or one for all of ours."""
        self.keys.copy_(other.keys)
        self.values.copy_(other.values)

    def reusable(self, prompt: Sequence[int]) -> int:
        """Length of the prompt prefix that row 0's keys and values can serve.

        At most all but the prompt's last token, which is fed for its logits.
        """
        return common_prefix(self.tokens[0], prompt[:-1])

    def update_keys(self, layer: int, positions: Tensor, k: Tensor) -> Tensor:
        """Write a leader's k [B, n_kv_heads, T, D] at positions [B, T]; returns its keys [B, n_kv_heads, S, D]."""
        index = self.key_index[layer]
        assert index is not None, f"layer {layer} follows and has no keys"
        return self._update(self.keys[index], positions, k)

    def update_values(self, layer: int, positions: Tensor, v: Tensor) -> Tensor:
        """As update_keys, for the v [B, n_kv_heads, T, D] of any layer."""
        return self._update(self.values[layer], positions, v)

    def as_read(self, positions: Tensor) -> tuple[Tensor, int, bool]:
        """How attention sees what an update at positions [B, T] returns: positions counted from its first slot, the
        number of its slots, and whether these lie as in a ring."""
        return positions, self.slots, False

    def _update(self, stored: Tensor, positions: Tensor, new: Tensor) -> Tensor:
        _write(stored, positions, new)
        return stored


class RingCache(StaticCache):
    """The cache of a model with a sliding window: position p lies in slot p % S, S = window + `costs.SLACK`.

    With a window of 3 and, for once, a slack of 2, after 7 tokens and before the next:

        slot         0    1    2    3    4
        position     5    6    2    3    4     the token at position 7 goes to slot 2 and attends to 5, 6 and itself

    An update of one position returns the slots as they lie. Of T > 1 positions, the same in every row and the view's
    last, it returns a copy in the order of positions.
    """

    __slots__ = ()

    wraps: ClassVar[bool] = True

    def reusable(self, prompt: Sequence[int]) -> int:
        """All that the row and the prompt have in common, or nothing: nothing where more was written after it than
        the slack holds, or would still be there after the prompt."""
        tokens = self.tokens[0]
        common = common_prefix(tokens, prompt[:-1])
        written = len(tokens) + WRITTEN_AHEAD
        intact = written <= self.slots or (written - common <= SLACK and len(prompt) >= len(tokens))
        return common if intact else 0

    def as_read(self, positions: Tensor) -> tuple[Tensor, int, bool]:
        n_new = positions.shape[1]
        if n_new == 1:
            return positions, self.slots, True
        first = self._first_kept(n_new)
        return positions - first, self.length - first, False

    def _first_kept(self, n_new: int) -> int:
        """The earliest position still in the ring when the last n_new of this view come."""
        return max(self.length - n_new - self.slots, 0)

    def _update(self, stored: Tensor, positions: Tensor, new: Tensor) -> Tensor:
        n_new, slots = new.shape[2], self.slots
        if n_new == 1:
            _write(stored, positions % slots, new)
            return stored
        # The first of these tokens still see what the last of them overwrite: read, then write.
        before = torch.arange(self._first_kept(n_new), self.length - n_new, device=stored.device) % slots
        read = torch.cat((_bits(stored)[:, :, before], _bits(to_dtype(new, stored.dtype))), dim=2)
        _write(stored, positions[:, -slots:] % slots, new[:, :, -slots:])
        return read.view(stored.dtype)


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """How many tokens two sequences begin with alike."""
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


def to_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in dtype; fp8 saturates at its largest number, where torch would give NaN."""
    if dtype == torch.float8_e4m3fn:
        x = x.clamp(-FP8_MAX, FP8_MAX)
    return x.to(dtype)


def _zeros(shape: tuple[int, ...], device: torch.device | str, dtype: torch.dtype) -> Tensor:
    """Zeros, since a weight of 0 times a NaN left in fresh memory would be NaN.

    On the CPU from numpy, whose zeros take no memory until they are written to: torch's own are resident at once.
    """
    n_bytes = math.prod(shape) * dtype.itemsize
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
