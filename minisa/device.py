"""Which device and dtype to run on, how many threads at what times, and how much memory was used."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from minisa.errors import MinisaError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
KV_DTYPES = DTYPES | {"fp8": torch.float8_e4m3fn}


@cache
def keep_forks_running() -> None:
    """PyTorch keeps to one thread in all processes forked from this one: OpenMP's others stay behind, and a child that
    asked for them would wait for ever. A model loaded before the fork keeps its C++ step's threads, one loaded in the
    child has one thread; a process started anew (multiprocessing's "spawn") has all of them."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_do_without_threads)


def _do_without_threads() -> None:
    torch.set_num_threads(1)
    if inductor := sys.modules.get("torch._inductor.config"):  # torch.compile, whose pool of threads stayed behind too
        inductor.compile_threads = 1  # type: ignore[attr-defined]


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """PyTorch computes in the calling thread alone, on a CPU where its threads are libgomp's, as they are on Linux.

    For milliseconds after an operation that they share they spin on cores that a C++ step's threads need by then.
    """
    threads, openmp = torch.get_num_threads(), _openmp()
    if openmp is None or threads == 1:
        yield
        return
    mkl = _mkl()
    before = 0  # of MKL: what OpenMP says
    try:  # Ctrl-C may come between any two lines
        openmp.omp_set_num_threads(1)  # torch.set_num_threads would change what other threads begin with too
        if mkl:
            before = mkl(1)
        yield
    finally:
        openmp.omp_set_num_threads(threads)
        if mkl:
            mkl(before)


@cache
def _openmp() -> ctypes.CDLL | None:
    """The libgomp that PyTorch has loaded, its own or the system's; None where it has another library."""
    bundled = (Path(torch.__file__).parent / "lib").glob("libgomp*.so*")
    try:
        return ctypes.CDLL(str(next(bundled, "libgomp.so.1")))
    except OSError:
        return None


@cache
def _mkl() -> Callable[[int], int] | None:
    """What sets the calling thread's number of threads of MKL, which heeds that before OpenMP's, and returns the number
    before; None where PyTorch is built without MKL."""
    try:
        return ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")).MKL_Set_Num_Threads_Local
    except (OSError, AttributeError):
        return None


def is_out_of_memory(error: Exception) -> bool:
    """PyTorch says so of a GPU by an exception of its own, of the CPU only in words."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def runs_kernels(device: torch.device) -> bool:
    """Whether Triton's kernels run there: on CUDA, and anywhere in its interpreter."""
    return device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"


def choose_device(name: str = "auto") -> torch.device:
    """ "auto" is CUDA where there is one, else Apple's GPU, else the CPU. MinisaError if the one named is absent."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        device = None
    if device is None or device.type not in ("cpu", "cuda", "mps"):
        raise MinisaError(f"--device {name!r} is not a device: expected auto, cpu, cuda, cuda:N or mps")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise MinisaError(f"--device {name}: this machine or this build of torch has no CUDA; try --device cpu")
        if (device.index or 0) >= torch.cuda.device_count():
            raise MinisaError(f"--device {name}: there are {torch.cuda.device_count()} CUDA devices, counted from 0")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise MinisaError("--device mps: this machine has no Apple GPU that torch can use; try --device cpu")
    return device


def choose_dtype(name: str, device: torch.device, *, native: bool = False) -> torch.dtype:
    """ "auto" is bf16 where the hardware multiplies it, else fp16 on a GPU and fp32 on a CPU.

    native: whether the C++ step will do the work, which reads bf16 at full speed on any CPU.
    """
    if name != "auto":
        if name not in DTYPES:
            raise MinisaError(f"--dtype {name!r} is not supported: expected auto, {', '.join(DTYPES)}")
        return DTYPES[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    if device.type == "cpu":
        return torch.bfloat16 if native or _cpu_multiplies_bf16() else torch.float32
    return torch.float16


def _cpu_multiplies_bf16() -> bool:
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def choose_kv_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of keys and values; "auto" is that of the weights.

    Raises MinisaError for another one as wide as it or wider, which would hold nothing more.
    """
    if name == "auto":
        return dtype
    if name not in KV_DTYPES:
        raise MinisaError(f"--kv-dtype {name!r} is not supported: expected auto, {', '.join(KV_DTYPES)}")
    chosen = KV_DTYPES[name]
    if chosen.itemsize >= dtype.itemsize and chosen != dtype:
        raise MinisaError(f"--kv-dtype {name}: keys and values are computed in {dtype_name(dtype)}; take it or fp8")
    return chosen


def dtype_name(dtype: torch.dtype) -> str:
    return next(name for name, known in KV_DTYPES.items() if known == dtype)


def free_memory(device: torch.device) -> int:
    """Bytes that could be allocated now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if sys.platform == "linux":
        with open("/proc/meminfo") as meminfo:
            for line in meminfo:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    return 4 << 30  # unknown: assume little


def peak_memory(device: torch.device) -> int:
    """The most bytes held so far: by torch's allocator on a GPU, by this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


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
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
