"""load_weights: from files to parameters, a few rows at a time.

Nothing but the parameters themselves is ever whole in memory: rows are read, dequantized, converted and put in their
place in one go, while they are in the processor's cache. Chunks are independent, so each thread takes whole ones:
torch's own threads would meet after every small operation, and stall there on a machine that is busy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minisa.checkpoint.files import StoredTensor
from minisa.checkpoint.layouts import Checkpoint
from minisa.errors import MinisaError

CHUNK = 1 << 17  # elements; half a megabyte in fp32
MAX_THREADS = 8
MAX_LISTED = 6  # names of each kind of misfit in an error


def load_weights(
    model: nn.Module,
    checkpoint: Checkpoint,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Fill a model built on the meta device: allocate its parameters on `device` in `dtype` and read them.

    progress: called after every chunk with the bytes of parameters filled so far, and of all of them.
    The wq and wk of layers that have none in the model (followers) are left unread. Raises one MinisaError that
    lists every tensor that is missing, left over or of another shape, before anything is allocated.
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in model.state_dict().items()}
    sources = _pair(shapes, checkpoint)
    total = sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize
    done = 0
    weights: dict[str, Tensor] = {}
    with _workers() as workers:
        for name, stored in sources.items():
            weights[name] = torch.empty(shapes[name], device=device, dtype=dtype)
            interleaved = checkpoint.interleaved and name.endswith(("attention.wq.weight", "attention.wk.weight"))
            chunks = _chunks(weights[name], stored, checkpoint.config.head_dim if interleaved else None)
            for n_elements in workers.map(_Chunk.fill, chunks):
                done += n_elements * dtype.itemsize
                if progress:
                    progress(done, total)
    model.load_state_dict(weights, assign=True)


@contextmanager
def _workers() -> Iterator[ThreadPoolExecutor]:
    """As many threads as torch would use, in each of which torch uses one."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(min(n_threads, MAX_THREADS)) as workers:
            yield workers
    finally:
        torch.set_num_threads(n_threads)


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Some rows of a stored tensor, and their place in a parameter.

    head_dim: given for interleaved q and k, whose row 2j + p of a head goes to row p · head_dim/2 + j.
    """

    place: Tensor
    stored: StoredTensor
    start: int
    head_dim: int | None

    def fill(self) -> int:
        """Read the rows and put them in their place; how many elements that was."""
        rows = self.stored.read_rows(self.start, self.start + len(self.place))
        if self.head_dim:
            half = self.head_dim // 2
            interleaved = self.place.unflatten(0, (-1, 2, half)).transpose(1, 2)  # [heads, j, p, in]
            interleaved.copy_(rows.unflatten(0, (-1, half, 2)))
        else:
            self.place.copy_(rows)
        return rows.numel()


def _chunks(weight: Tensor, stored: StoredTensor, head_dim: int | None) -> Iterator[_Chunk]:
    unit = head_dim or 1  # rows that must not be parted
    step = max(CHUNK // (weight[0].numel() * unit), 1) * unit
    for start in range(0, len(weight), step):
        yield _Chunk(weight[start : start + step], stored, start, head_dim)


def _pair(shapes: Mapping[str, tuple[int, ...]], checkpoint: Checkpoint) -> dict[str, StoredTensor]:
    """The stored tensor for each of the model's parameters, in the order of the files."""
    stored = checkpoint.tensors
    unread = {name.replace(".wv.", kind) for name in shapes if ".attention.wv." in name for kind in (".wq.", ".wk.")}
    misfits = {
        "missing": [name for name in shapes if name not in stored],
        "left over": [
            *(name for name in stored if name not in shapes and name not in unread),
            *(repr(name) for name in checkpoint.unknown),
        ],
        "of another shape": [
            f"{name} {list(stored[name].shape)} in place of {list(shape)}"
            for name, shape in shapes.items()
            if name in stored and stored[name].shape != shape
        ],
    }
    if any(misfits.values()):
        lists = "; ".join(f"{kind}: {_shortened(found)}" for kind, found in misfits.items() if found)
        raise MinisaError(f"{checkpoint.path}: the tensors do not fit the model its config describes: {lists}")
    return {name: tensor for name, tensor in stored.items() if name in shapes}


def _shortened(found: Iterable[str]) -> str:
    found = list(found)
    more = f" and {len(found) - MAX_LISTED} more" if len(found) > MAX_LISTED else ""
    return ", ".join(found[:MAX_LISTED]) + more
