"""Timing primitives: what this machine can do, and fair turns for those who are compared on it.

Speeds drift: other programs run, clocks change, a cloud machine's neighbours wake up. So nothing here is compared
across time. Contenders take turns of a few steps each, in an order that alternates, and the memory bandwidth that
they are held against is read in the same rounds.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from minisa.device import free_memory, synchronize

Result = TypeVar("Result")
Turn = TypeVar("Turn")

PAUSE = 0.01  # seconds before a turn: the threads of the one before spin a while before they sleep
N_BUFFERS = 4
BUFFER = {"cpu": 256 << 20, "cuda": 2 << 30}  # bytes; on a GPU long enough for a launch not to show
MIN_MATRIX, MAX_MATRIX = 256, 8192
LONG_ENOUGH = 0.02  # seconds a matrix product should take
MAX_ROUNDS, MIN_ROUNDS, MAX_SECONDS = 8, 3, 10.0  # without --repeats; a large model gets fewer rounds


@dataclass(frozen=True, slots=True)
class Spread:
    """The median of some measurements, and where the middle four fifths of them lie."""

    median: float
    p10: float
    p90: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        deciles = statistics.quantiles(values, n=10, method="inclusive") if len(values) > 1 else list(values) * 9
        return cls(statistics.median(values), deciles[0], deciles[-1])

    def rate(self, amount: float) -> Spread:
        """`amount` divided by these: of seconds, a rate. p10 stays the low end."""
        return Spread(amount / self.median, amount / self.p90, amount / self.p10)


def timed(work: Callable[[], Result], device: torch.device) -> tuple[float, Result]:
    """Seconds until the device has done `work`, and its result."""
    synchronize(device)
    began = time.perf_counter()
    result = work()
    synchronize(device)
    return time.perf_counter() - began, result


def turns(contenders: Sequence[Turn], rounds: int | None) -> Iterator[tuple[int, Turn]]:
    """(round, contender) for every contender in every round, there and back, with a pause before each.

    The order alternates so that nobody always goes after the same neighbour, nor always first.
    rounds: None for MAX_ROUNDS, or those that begin within MAX_SECONDS, but at least MIN_ROUNDS.
    """
    began = time.monotonic()
    for i in range(rounds or MAX_ROUNDS):
        if rounds is None and i >= MIN_ROUNDS and time.monotonic() - began > MAX_SECONDS:
            return
        for contender in contenders if i % 2 == 0 else reversed(contenders):
            time.sleep(PAUSE)
            yield i, contender


WAYS: tuple[Callable[[Tensor], Tensor], ...] = (torch.sum, torch.amax, torch.linalg.vector_norm)  # each reads once


class ReadBandwidth:
    """Reads memory as fast as torch can on this device with the threads it has.

    Several buffers, together larger than the last-level cache, are read in turn, so that none is still in it.
    On a CPU every thread reads parts of its own, start to end: torch's threads would meet after each buffer, and on a
    busy machine that halves the figure. Of several ways to read the fastest is kept: a ceiling that is too low would
    flatter everybody under it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        limit = free_memory(device) // (4 * N_BUFFERS)
        self.nbytes = min(BUFFER.get(device.type, BUFFER["cpu"]), limit) // 4096 * 4096
        buffers = [torch.ones(self.nbytes // 4, device=device) for _ in range(N_BUFFERS)]
        n_threads = torch.get_num_threads() if device.type == "cpu" else 1
        parts = [part for buffer in buffers for part in buffer.chunk(n_threads)]
        self._shares = [parts[i::n_threads] for i in range(n_threads)]
        self._threads = _single_threads(n_threads) if n_threads > 1 else None
        speeds = []
        for way in WAYS:
            self._read: Callable[[Tensor], Tensor] = way
            self.once()
            speeds.append(max(self.once(), self.once(), self.once()))
        self._read = WAYS[speeds.index(max(speeds))]

    @property
    def way(self) -> str:
        return self._read.__name__

    def once(self) -> float:
        """Bytes a second over one pass through every buffer."""

        each = self._threads.map if self._threads else map
        seconds, _ = timed(lambda: list(each(self._read_share, self._shares)), self.device)
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
    size, seconds = MIN_MATRIX // 2, 0.0
    while seconds < LONG_ENOUGH and size < MAX_MATRIX:
        size *= 2
        product = partial(torch.matmul, *(torch.ones(size, size, device=device, dtype=dtype) for _ in range(2)))
        timed(product, device)
        seconds, _ = timed(product, device)
    return [2 * size**3 / timed(product, device)[0] for _ in range(repeats)]
