"""Benchmark: the order of a run, and what it has measured so far."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from minisa.benchmark.contender import Facts, Minisa, Opening
from minisa.benchmark.gguf_writer import check, write_gguf
from minisa.benchmark.llamacpp_peer import LlamaCpp
from minisa.benchmark.measure import ReadBandwidth, matrix_rates, turns
from minisa.benchmark.settings import GREEDY_PROMPT, GREEDY_TOKENS, Settings
from minisa.benchmark.transformers_peer import TransformersPeer
from minisa.benchmark.worker import Worker
from minisa.device import dtype_name
from minisa.sharing import SharingPlan

READINGS = 12  # of the bandwidth, at the start and at the end


@dataclass
class Configuration:
    """One that takes turns. agreement: how many of its first greedy tokens are plain's, of GREEDY_TOKENS."""

    name: str
    plan: SharingPlan
    worker: Worker
    facts: Facts
    first_token: float | None = None  # seconds
    agreement: int | None = None


@dataclass
class Cell:
    """One configuration's measurements at one length.

    kind: "prefill" of `tokens`, or "decode" with `tokens` in the cache. rounds: the seconds of each step of each round;
    a prompt is one step. bandwidth: bytes a second, read in the same rounds.
    """

    configuration: Configuration
    kind: str
    tokens: int
    bandwidth: list[float]
    rounds: list[list[float]] = field(default_factory=list)


@dataclass
class Ceiling:
    """Readings of what the machine can do: bytes a second, and floating-point operations a second."""

    bandwidth: list[float]
    matrix: list[float]


class Benchmark:
    """A run. Its stages in their order: open, measure_ceiling, measure. What there is so far is readable throughout.

    tell: called with what is being done.
    """

    def __init__(self, settings: Settings, tell: Callable[[str], None]) -> None:
        self.settings = settings
        self.configurations: list[Configuration] = []  # plain, shared, the peers
        self.ceilings: dict[str, Ceiling] = {}  # "start" and "end"
        self.cells: list[Cell] = []
        self._tell = tell
        self._resources = ExitStack()
        self.reader: ReadBandwidth  # once the ceiling is measured
        generator = torch.Generator().manual_seed(0)
        shape = (settings.opening.context,)
        self._tokens = torch.randint(settings.opening.config.vocab_size, shape, generator=generator).tolist()

    def __enter__(self) -> Benchmark:
        return self

    def __exit__(self, *_: object) -> None:
        self._resources.close()

    def open(self) -> None:
        """Load one configuration after the other, and compare the peers' output with plain's."""
        settings, opening = self.settings, self.settings.opening
        if opening.path is not None:
            _into_page_cache(opening.path)
        facts = self._open("plain", Minisa, opening).facts
        opening = replace(opening, dtype=dtype_name(facts.dtype))
        if settings.shared is not None:
            self._open("shared", Minisa, replace(opening, plan=settings.shared))
        for peer in settings.against:
            if peer == "transformers":
                self._open(peer, TransformersPeer, opening)
            else:
                self._open(peer, LlamaCpp, opening, self._write_gguf(opening))
        expected: list[int] = []
        for configuration in self.configurations:
            began = time.perf_counter()
            configuration.worker.call("greedy", self._tokens[: settings.prompt_lengths[0]], 1)
            configuration.first_token = time.perf_counter() - began
            if settings.against and configuration.name != "shared":
                output = configuration.worker.call("greedy", self._tokens[:GREEDY_PROMPT], GREEDY_TOKENS)
                expected = expected or output
                same = [a == b for a, b in zip(expected, output, strict=True)]
                configuration.agreement = [*same, False].index(False)

    def measure_ceiling(self, when: str = "start") -> None:
        self._tell(f"the ceiling at the {when}")
        if when == "start":
            torch.set_num_threads(self.settings.opening.threads)
            self.reader = ReadBandwidth(self.settings.opening.device)
        # A processor without instructions for a narrow dtype multiplies it as fp32, which torch by itself does not.
        dtypes = {self.configurations[0].facts.dtype, torch.float32}
        rates = [matrix_rates(self.reader.device, dtype) for dtype in dtypes]
        self.ceilings[when] = Ceiling([self.reader.once() for _ in range(READINGS)], max(rates, key=statistics.median))

    def measure(self) -> None:
        """Prefill, then decoding at longer and longer contexts, in turns; at last the ceiling once more."""
        for length in self.settings.prompt_lengths:
            self._measure("prefill", length, lambda worker, n: [worker.call("prefill", self._tokens[:n])])
        for context in self.settings.contexts:
            for configuration in self.configurations:
                self._tell(f"filling the context of {configuration.name} to {context}")
                configuration.worker.call("fill", self._tokens[:context], self.settings.opening.batch)
            self._measure("decode", context, lambda worker, n: worker.call("decode", n, self.settings.new_tokens))
        self.measure_ceiling("end")

    def _measure(self, kind: str, tokens: int, step: Callable[[Worker, int], list[float]]) -> None:
        bandwidth: list[float] = []
        cells = [Cell(configuration, kind, tokens, bandwidth) for configuration in self.configurations]
        self.cells += cells
        for cell in cells:
            self._tell(f"warming up {kind} {tokens} of {cell.configuration.name}")
            step(cell.configuration.worker, tokens)
        self._tell(f"{kind} {tokens}")
        contenders: list[Cell | ReadBandwidth] = [*cells, self.reader]
        for _, turn in turns(contenders, self.settings.repeats):
            if isinstance(turn, ReadBandwidth):
                bandwidth.append(turn.once())
            else:
                turn.rounds.append(step(turn.configuration.worker, tokens))
        for configuration in self.configurations:
            configuration.facts = configuration.worker.call("facts")

    def _open(self, name: str, factory: Callable[..., Any], opening: Opening, *rest: Any) -> Configuration:
        self._tell(f"loading {name}")
        worker = Worker(name, factory, opening, *rest)
        self._resources.callback(worker.close)
        configuration = Configuration(name, opening.plan, worker, worker.call("facts"))
        self.configurations.append(configuration)
        return configuration

    def _write_gguf(self, opening: Opening) -> Path:
        """The weights for llama.cpp, written in another process, whose memory is nobody's."""
        check(opening)
        self._tell("writing the weights for llama.cpp")
        path = Path(self._resources.enter_context(tempfile.TemporaryDirectory(prefix="minisa-"))) / "weights.gguf"
        Worker("llama.cpp", write_gguf, opening, path).close()
        return path


def _into_page_cache(path: Path) -> None:
    """Read a checkpoint once, so that whoever loads first does not wait for the disk on everybody's behalf."""
    for file in [path] if path.is_file() else [file for file in path.iterdir() if file.is_file()]:
        with file.open("rb") as stream:
            while stream.read(1 << 24):
                pass
