"""Timing primitives: what this machine can do, and fair turns for those who are compared on it.

Speeds drift: other programs run, clocks change, a cloud machine's neighbours wake up. So nothing here is compared
across time. Contenders take turns of a few steps each, in an order that alternates, and the memory bandwidth that
they are held against is read in the same rounds.
"""

from __future__ import annotations

import math
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from minisa.device import free_memory, synchronize

Result = TypeVar("Result")
Turn = TypeVar("Turn")

PAUSE = 0.01  # seconds before a turn: the threads of the one before spin a while before they sleep
N_BUFFERS = 4
LARGEST_BUFFER = 2 << 30  # bytes
SMALLEST_MATRIX, LARGEST_MATRIX = 256, 8192
LONG_ENOUGH = 0.02  # seconds a matrix product should take


@dataclass(frozen=True, slots=True)
class Spread:
    """The median of some measurements, and where the middle four fifths of them lie."""

    median: float
    p10: float
    p90: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), percentile(values, 0.1), percentile(values, 0.9))

    def rate(self, amount: float) -> Spread:
        """`amount` divided by these: of seconds, a rate. p10 stays the low end."""
        return Spread(amount / self.median, amount / self.p90, amount / self.p10)


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` (0 to 1) of them lie, interpolated between neighbours."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def timed(work: Callable[[], Result], device: torch.device) -> tuple[float, Result]:
    """Seconds until the device has done `work`, and its result."""
    synchronize(device)
    began = time.perf_counter()
    result = work()
    synchronize(device)
    return time.perf_counter() - began, result


def turns(
    contenders: Sequence[Turn], rounds: int, *, seconds: float = math.inf, least: int = 1
) -> Iterator[tuple[int, Turn]]:
    """(round, contender) for every contender in every round, there and back, with a pause before each.

    The order alternates so that nobody always goes after the same neighbour, nor always first.
    No round begins once `seconds` are over, the first `least` excepted.
    """
    began = time.monotonic()
    for i in range(rounds):
        if i >= least and time.monotonic() - began > seconds:
            return
        for contender in contenders if i % 2 == 0 else reversed(contenders):
            time.sleep(PAUSE)
            yield i, contender


class ReadBandwidth:
    """Reads memory as fast as torch can on this device with the threads it has.

    Several buffers, each larger than the last-level cache, are read in turn, so that none is still in it.
    On a CPU every thread reads parts of its own, start to end: torch's threads would meet after each buffer, and on a
    busy machine that halves the figure. Of several ways to read the fastest is kept: a ceiling that is too low would
    flatter everybody under it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        largest = min(LARGEST_BUFFER, free_memory(device) // (4 * N_BUFFERS))
        self.nbytes = max(min(4 * last_level_cache(device), largest) // 2**20, 1) * 2**20
        buffers = [torch.ones(self.nbytes // 4, device=device) for _ in range(N_BUFFERS)]
        n_threads = torch.get_num_threads() if device.type == "cpu" else 1
        parts = [part for buffer in buffers for part in buffer.chunk(n_threads)]
        self._shares = [parts[i::n_threads] for i in range(n_threads)]
        self._threads = _single_threads(n_threads) if n_threads > 1 else None
        ways: dict[str, Callable[[Tensor], Tensor]] = {
            "sum": torch.sum,
            "largest": torch.amax,
            "norm": torch.linalg.vector_norm,
        }
        speeds: dict[str, float] = {}
        for name, way in ways.items():
            self._read = way
            self.once()
            speeds[name] = max(self.once(), self.once(), self.once())
        self.way = max(speeds, key=lambda name: speeds[name])
        self._read = ways[self.way]

    def once(self) -> float:
        """Bytes a second over one pass through every buffer."""

        def read_all() -> None:
            if self._threads is None:
                self._read_share(self._shares[0])
            else:
                list(self._threads.map(self._read_share, self._shares))

        seconds, _ = timed(read_all, self.device)
        return self.nbytes * N_BUFFERS / seconds

    def _read_share(self, parts: Sequence[Tensor]) -> None:
        for part in parts:
            self._read(part)


def _single_threads(n_threads: int) -> ThreadPoolExecutor:
    """Threads in each of which torch uses one, as it was told when they first asked; the caller keeps its own."""
    everybody_is_here = threading.Barrier(n_threads)

    def begin(_: int) -> None:
        torch.set_num_threads(1)
        everybody_is_here.wait()

    pool = ThreadPoolExecutor(n_threads)
    list(pool.map(begin, range(n_threads)))
    torch.set_num_threads(n_threads)  # some of its libraries have one number for the whole process
    return pool


def matrix_rates(device: torch.device, dtype: torch.dtype, repeats: int = 5) -> list[float]:
    """Floating-point operations a second of square matrix products in dtype, large enough to keep the device busy."""
    size, seconds = SMALLEST_MATRIX // 2, 0.0
    while seconds < LONG_ENOUGH and size < LARGEST_MATRIX:
        size *= 2
        product = partial(torch.matmul, *(torch.ones(size, size, device=device, dtype=dtype) for _ in range(2)))
        timed(product, device)
        seconds, _ = timed(product, device)
    return [2 * size**3 / timed(product, device)[0] for _ in range(repeats)]


def last_level_cache(device: torch.device) -> int:
    """Bytes of the cache nearest to memory; a guess on the large side where nobody tells."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size * 8  # and long enough for a launch not to show
    sizes = [0]
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        try:
            text = (index / "size").read_text().strip()
        except OSError:
            continue
        if text.endswith("K") and text[:-1].isdecimal():
            sizes.append(int(text[:-1]) << 10)
    return max(sizes) or 64 << 20
