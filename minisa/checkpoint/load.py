"""load_weights: from files to parameters, a few rows at a time.

Nothing but the parameters themselves is ever whole in memory: rows are read, dequantized, converted and put in their
place in one go, while they are in the processor's cache. Chunks are independent, so each thread takes whole ones:
torch's own threads would meet after every small operation, and stall there on a machine that is busy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from minisa.checkpoint.files import StoredTensor
from minisa.checkpoint.ggml import QuantizedTensor
from minisa.checkpoint.layouts import Checkpoint
from minisa.device import dtype_name, one_torch_thread
from minisa.errors import MinisaError
from minisa.quantize import BLOCK, Format, empty_blocks, replace_matrix
from minisa.quantize import quantize as to_blocks

CHUNK = 1 << 17  # elements; half a megabyte in fp32
MAX_THREADS = 8
MAX_LISTED = 6  # names of each kind of misfit in an error

Read = Callable[[int, int], tuple[Tensor, ...]]  # rows start..stop of a tensor, or of each part of a quantized one


@torch.inference_mode(False)  # the mode of the caller's thread, which those that read do not share
def load_weights(
    model: nn.Module,
    checkpoint: Checkpoint,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    quantize: Format | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Fill a model built on the meta device: allocate its parameters on `device` in `dtype` and read them.

    quantize: the format of the matrices, whose modules are then replaced by quantized ones.
    progress: called after every chunk with the bytes of parameters filled so far, and of all of them.
    The wq and wk of layers that have none in the model (followers) are left unread. Raises one MinisaError that
    lists every tensor that is missing, left over or of another shape, before anything is allocated; and one that names
    a tensor with NaN or infinite weights, stored ones or what dtype makes of them.
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in model.state_dict().items()}
    sources = _pair(shapes, checkpoint)
    total = sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize
    done = 0
    plain: dict[str, Tensor] = {}
    with ThreadPoolExecutor(min(torch.get_num_threads(), MAX_THREADS)) as workers:
        for name, stored in sources.items():
            interleaved = checkpoint.interleaved and name.endswith(("attention.wq.weight", "attention.wk.weight"))
            format = _format(name, shapes[name], quantize)
            places: tuple[Tensor, ...]
            read: Read
            if format is None:
                plain[name] = torch.empty(shapes[name], device=device, dtype=dtype)
                places, read = (plain[name],), partial(_read_rows, stored)
            else:
                blocks = empty_blocks(shapes[name], format, device)
                replace_matrix(model, name, blocks, dtype)
                places, read = tuple(blocks.tensors()), partial(_read_blocks, stored, format)
            for n_elements in workers.map(
                _Chunk.fill,
                _chunks(f"{checkpoint.path}: {name}", places, read, checkpoint.config.head_dim if interleaved else 0),
            ):
                done += n_elements * dtype.itemsize
                if progress:
                    progress(done, total)
    model.load_state_dict(plain, assign=True, strict=False)  # _pair has seen to it that none is missing


def _format(name: str, shape: tuple[int, ...], quantize: Format | None) -> Format | None:
    if quantize is None or len(shape) == 1:
        return None
    if shape[1] % BLOCK:
        raise MinisaError(f"{name} has {shape[1]} columns, --quantize works on blocks of {BLOCK}: leave it out")
    return "int8" if name in ("tok_embeddings.weight", "output.weight") else quantize


def _read_rows(stored: StoredTensor, start: int, stop: int) -> tuple[Tensor, ...]:
    return (stored.read_rows(start, stop),)


def _read_blocks(stored: StoredTensor, format: Format, start: int, stop: int) -> tuple[Tensor, ...]:
    if isinstance(stored, QuantizedTensor):
        return tuple(stored.read_blocks(start, stop, format).tensors())
    return tuple(to_blocks(stored.read_rows(start, stop), format).tensors())


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Some rows of a stored tensor, and their places: in a parameter, or in the parts of a quantized one.

    name: for messages, the file's and the parameter's. head_dim: given for interleaved q and k, whose row 2j + p of a
    head goes to row p · head_dim/2 + j.
    """

    name: str
    places: tuple[Tensor, ...]
    read: Read
    start: int
    head_dim: int

    def fill(self) -> int:
        """Read the rows and put them in their places; how many weights that was."""
        with one_torch_thread():
            parts = self.read(self.start, self.start + len(self.places[0]))
            for place, rows in zip(self.places, parts, strict=True):
                if rows.is_floating_point():
                    self._check(*rows.aminmax(), dtype=place.dtype)
                if self.head_dim:
                    half = self.head_dim // 2
                    interleaved = place.unflatten(0, (-1, 2, half)).transpose(1, 2)  # [heads, j, p, in]
                    interleaved.copy_(rows.unflatten(0, (-1, half, 2)))
                else:
                    place.copy_(rows)
        return parts[0].numel()

    def _check(self, *extremes: Tensor, dtype: torch.dtype) -> None:
        """Raises MinisaError where the least or the greatest weight is no number, or none in dtype."""
        where = f"{self.name}: NaN or infinite weights in rows {self.start} to {self.start + len(self.places[0]) - 1}"
        if not all(extreme.isfinite() for extreme in extremes):
            raise MinisaError(f"{where}: the file is damaged, fetch it again")
        if not all(extreme.to(dtype).isfinite() for extreme in extremes):
            raise MinisaError(f"{where} in {dtype_name(dtype)}: expected smaller ones, take --dtype bf16 or fp32")


def _chunks(name: str, places: tuple[Tensor, ...], read: Read, head_dim: int) -> Iterator[_Chunk]:
    unit = head_dim or 1  # rows that must not be parted
    n_rows = len(places[0])
    step = max(CHUNK // (places[0][0].numel() * unit), 1) * unit
    for start in range(0, n_rows, step):
        yield _Chunk(name, tuple(place[start : start + step] for place in places), read, start, head_dim)


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
