"""load_weights: from files to parameters, a few rows at a time.

Nothing but the parameters themselves is ever whole in memory: rows are read, dequantized, converted and put in their
place in one go, while they are in the processor's cache. Chunks are independent, so each thread takes whole ones:
torch's own threads would meet after every small operation, and stall there on a machine that is busy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
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
    a tensor with NaN or infinite weights, whether stored so or rounded so by dtype.
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in model.state_dict().items()}
    sources = _pair(shapes, checkpoint)
    total = sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize
    done = 0
    plain: dict[str, Tensor] = {}
    with ThreadPoolExecutor(min(torch.get_num_threads(), MAX_THREADS)) as workers:
        for name, stored in sources.items():
            format = _format(name, shapes[name], quantize)
            if format is None:
                plain[name] = torch.empty(shapes[name], device=device, dtype=dtype)
                places = [plain[name]]
            else:
                blocks = empty_blocks(shapes[name], format, device)
                replace_matrix(model, name, blocks, dtype)
                places = blocks.tensors()
            turned = checkpoint.interleaved and name.endswith(("attention.wq.weight", "attention.wk.weight"))
            head_dim = checkpoint.config.head_dim if turned and name not in checkpoint.replaced else 1
            row = math.prod(shapes[name][1:])
            step = max(CHUNK // (row * head_dim), 1) * head_dim  # whole heads, where their rows are put in order
            fill = partial(_fill, f"{checkpoint.path}: {name}", stored, format, places, head_dim, step)
            for n_rows in workers.map(fill, range(0, shapes[name][0], step)):
                done += n_rows * row * dtype.itemsize
                if progress:
                    progress(done, total)
    model.load_state_dict(plain, assign=True, strict=False)  # _pair has seen to it that none is missing


def _format(name: str, shape: tuple[int, ...], quantize: Format | None) -> Format | None:
    if quantize is None or len(shape) == 1:
        return None
    if shape[1] % BLOCK:
        raise MinisaError(f"{name} has {shape[1]} columns, --quantize works on blocks of {BLOCK}: leave it out")
    return "int8" if name in ("tok_embeddings.weight", "output.weight") else quantize


def _fill(
    where: str, stored: StoredTensor, format: Format | None, places: list[Tensor], head_dim: int, step: int, start: int
) -> int:
    """Read `step` rows from `start` on and put them into places, a parameter or the parts of a quantized one.

    head_dim: 1, or the rows of an interleaved head, whose row 2j + p goes to row p · head_dim/2 + j.
    Returns the number of rows. Raises MinisaError where a weight is no finite number.
    """
    stop = min(start + step, len(places[0]))
    with one_torch_thread():
        for place, rows in zip(places, _read(stored, format, start, stop), strict=True):
            if rows.is_floating_point():
                _require_finite(f"{where}: NaN or infinite weights in rows {start} to {stop - 1}", rows, place.dtype)
            target = place[start:stop]
            if head_dim > 1:
                target = target.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2)  # [heads, j, p, in]
                rows = rows.unflatten(0, (-1, head_dim // 2, 2))
            target.copy_(rows)
    return stop - start


def _read(stored: StoredTensor, format: Format | None, start: int, stop: int) -> list[Tensor]:
    if format is None:
        return [stored.read_rows(start, stop)]
    if isinstance(stored, QuantizedTensor):
        return stored.read_blocks(start, stop, format).tensors()
    return to_blocks(stored.read_rows(start, stop), format).tensors()


def _require_finite(what: str, rows: Tensor, dtype: torch.dtype) -> None:
    extremes = torch.stack(rows.aminmax())
    if not extremes.isfinite().all():
        raise MinisaError(f"{what}: the file is damaged, fetch it again")
    if not extremes.to(dtype).isfinite().all():
        raise MinisaError(f"{what} in {dtype_name(dtype)}: expected smaller ones, take --dtype bf16 or fp32")


def _pair(shapes: Mapping[str, tuple[int, ...]], checkpoint: Checkpoint) -> dict[str, StoredTensor]:
    """The stored tensor for each of the model's parameters, in the order of the files."""
    stored = checkpoint.tensors
    unread = {name.replace(".wv.", kind) for name in shapes if ".attention.wv." in name for kind in (".wq.", ".wk.")}
    misfits = {
        "missing": [name for name in shapes if name not in stored],
        "left over": [*(stored.keys() - shapes.keys() - unread), *map(repr, checkpoint.unknown)],
        "of another shape": [
            f"{name} {list(stored[name].shape)} in place of {list(shape)}"
            for name, shape in shapes.items()
            if name in stored and stored[name].shape != shape
        ],
    }
    if any(misfits.values()):
        lists = "; ".join(f"{kind}: {', '.join(found[:6])}" for kind, found in misfits.items() if found)
        raise MinisaError(f"{checkpoint.path}: the tensors do not fit the model its config describes: {lists}")
    return {name: tensor for name, tensor in stored.items() if name in shapes}
