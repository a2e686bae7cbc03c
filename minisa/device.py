"""Which device and dtype to run on, how many threads at what times, and how much memory was used."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from minisa.errors import MinisaError

# By our names, then by torch's.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DTYPES |= {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
KV_DTYPES = DTYPES | {"fp8": torch.float8_e4m3fn}


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """PyTorch computes in the calling thread alone: a C++ step needs the cores on which its pool would busy-wait."""
    n_threads = torch.get_num_threads()
    if n_threads == 1:
        yield
        return
    try:
        torch.set_num_threads(1)
        yield
    finally:
        torch.set_num_threads(n_threads)


def is_out_of_memory(error: Exception) -> bool:
    """PyTorch has an exception of its own for a GPU, and only words for the CPU."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def choose_device(name: str = "auto") -> torch.device:
    """ "auto" is CUDA where there is one, else Apple's GPU, else the CPU. MinisaError if the one named is absent."""
    counts = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available()), "cpu": 1}
    if name == "auto":
        return torch.device(next(kind for kind, count in counts.items() if count))
    try:
        device = torch.device(name)
        count = counts[device.type]
    except (RuntimeError, TypeError, KeyError):
        raise MinisaError(f"--device {name!r} is not a device: expected auto, cpu, cuda, cuda:N or mps") from None
    if (device.index or 0) >= count:
        raise MinisaError(f"--device {name}: torch has {count or 'no'} {device.type} devices here; try --device cpu")
    return device


def choose_dtype(name: str | torch.dtype, device: torch.device, *, native: bool = False) -> torch.dtype:
    """ "auto" is bf16 where the hardware multiplies it, else fp16 on a GPU and fp32 on a CPU.

    native: whether the C++ step will do the work, which reads bf16 at full speed on any CPU.
    """
    if name != "auto":
        return named_dtype(name)
    if device.type == "cpu":
        fast = native or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return torch.bfloat16 if fast else torch.float32
    return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float16


def choose_kv_dtype(name: str | torch.dtype, dtype: torch.dtype) -> torch.dtype:
    """The dtype of keys and values; "auto" is that of the weights.

    Raises MinisaError for another one as wide as it or wider, which would hold nothing more.
    """
    chosen = dtype if name == "auto" else named_dtype(name, "--kv-dtype", KV_DTYPES)
    if chosen.itemsize >= dtype.itemsize and chosen != dtype:
        raise MinisaError(f"--kv-dtype {name}: keys and values are computed in {dtype_name(dtype)}; take it or fp8")
    return chosen


def named_dtype(
    name: str | torch.dtype, flag: str = "--dtype", known: Mapping[str, torch.dtype] = DTYPES
) -> torch.dtype:
    """The dtype of one of the known names, or a torch.dtype as it is. Raises MinisaError for any other."""
    bare = str(name).removeprefix("torch.")
    if bare not in known:
        raise MinisaError(f"{flag} {str(name)!r} is not supported: expected auto, {', '.join(known)}")
    return known[bare]


def dtype_name(dtype: torch.dtype) -> str:
    return next(name for name, known in KV_DTYPES.items() if known == dtype)


def free_memory(device: torch.device) -> int:
    """Bytes that could be allocated now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if sys.platform == "linux":
        with open("/proc/meminfo") as meminfo:
            return next(int(line.split()[1]) << 10 for line in meminfo if line.startswith("MemAvailable:"))
    return 4 << 30  # unknown: assume little


def peak_memory(device: torch.device) -> int:
    """The most bytes held so far: by torch's allocator on a GPU, by this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << (0 if sys.platform == "darwin" else 10)


def begin_reading(numbers: Tensor) -> Callable[[], list[int]]:
    """Begin to bring whole numbers [N] to the host; the call waits for them, but for nothing queued after them."""
    if numbers.device.type != "cuda":
        return numbers.tolist
    host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
    host.copy_(numbers, non_blocking=True)
    arrived = torch.cuda.current_stream(numbers.device).record_event()

    def wait() -> list[int]:
        arrived.synchronize()
        return host.tolist()

    return wait


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
