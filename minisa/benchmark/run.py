"""Benchmark: the order of a run, and what it has found so far."""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from minisa.benchmark.contender import Facts, Minisa, Opening
from minisa.benchmark.gguf_writer import ggml_type, own_gguf, write_gguf
from minisa.benchmark.llamacpp_peer import LlamaCpp
from minisa.benchmark.measure import ReadBandwidth, matrix_rates, turns
from minisa.benchmark.settings import GREEDY_PROMPT, GREEDY_TOKENS, Settings
from minisa.benchmark.transformers_peer import TransformersPeer
from minisa.benchmark.worker import Worker
from minisa.device import free_memory
from minisa.sharing import SharingPlan

READINGS = 12  # of the bandwidth, at the start and at the end
# Without --repeats: so many rounds, or as many as begin in LONGEST seconds. A large model gets fewer.
ROUNDS, LEAST_ROUNDS, LONGEST = 8, 3, 10.0

Turn = TypeVar("Turn")
Tell = Callable[[str, int, int], None]  # what is being done, how many rounds are done, of how many


@dataclass
class Measured:
    """One configuration and what was measured of it, in seconds and bytes.

    prefill: for each prompt length, a time for each round. decode: for each context, the times of single steps, in
    a list for each round. agreement: how many of GREEDY_TOKENS are the same as plain's before the first that differs.
    """

    name: str
    plan: SharingPlan
    facts: Facts
    worker: Worker
    first_token: float | None = None
    prefill: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    decode: dict[int, list[list[float]]] = field(default_factory=lambda: defaultdict(list))
    peak_memory: int | None = None
    agreement: int | None = None
    chosen: dict[str, str] = field(default_factory=dict)  # how transformers ran best


@dataclass
class Ceiling:
    """Readings of what the machine can do: bytes a second, and floating-point operations a second."""

    bandwidth: list[float]
    matrix: list[float]


class Benchmark:
    """Its stages, in this order: measure_ceiling, open, measure. What is there so far stays readable throughout."""

    def __init__(self, settings: Settings, tell: Tell) -> None:
        self.settings = settings
        self.start: Ceiling | None = None
        self.end: Ceiling | None = None
        self.beside: dict[int, list[float]] = defaultdict(list)  # bandwidth, read in the rounds of each context
        self.own: list[Measured] = []  # plain, then shared
        self.peers: list[Measured] = []
        self.reader: ReadBandwidth | None = None
        self._tell = tell
        self._resources = ExitStack()
        generator = torch.Generator().manual_seed(0)
        longest = max(settings.opening.context, GREEDY_PROMPT)
        self._tokens = torch.randint(settings.opening.config.vocab_size, (longest,), generator=generator).tolist()

    def __enter__(self) -> Benchmark:
        return self

    def __exit__(self, *_: object) -> None:
        self._resources.close()

    @property
    def everyone(self) -> list[Measured]:
        return self.own + self.peers

    def measure_ceiling(self) -> None:
        self._tell("the ceiling", 0, 1)
        torch.set_num_threads(self.settings.opening.threads)
        self.reader = ReadBandwidth(self.settings.opening.device)
        self.start = self._ceiling(self.reader)

    def open(self) -> None:
        """Load one configuration after the other, so that nobody's load time has company."""
        settings = self.settings
        if settings.opening.path is not None:
            _into_page_cache(settings.opening.path)
        self.own.append(self._open("plain", Minisa, settings.opening))
        if settings.shared is not None:
            self.own.append(self._open("shared", Minisa, replace(settings.opening, plan=settings.shared)))
        for peer in settings.against:
            if peer == "transformers":
                self.peers.append(self._open(peer, TransformersPeer, settings.opening))
            else:
                self.peers.append(self._open(peer, LlamaCpp, settings.opening, self._gguf()))
        self._compare_outputs()

    def measure(self) -> None:
        """Prefill, then decoding at longer and longer contexts, in turns; at last the ceiling once more."""
        for length in self.settings.prompt_lengths:
            self._prefill(self._tokens[:length])
        for context in self.settings.contexts:
            self._decode(context)
        self._tell("the ceiling again", 0, 1)
        assert self.reader is not None
        self.end = self._ceiling(self.reader)

    def _prefill(self, prompt: list[int]) -> None:
        what = f"prefill of {len(prompt)}"
        for measured in self.everyone:
            self._tell(f"{what}: warming up {measured.name}", 0, 1)
            measured.worker.call("prefill", prompt)
        for measured in self._turns(what, self.everyone):
            measured.prefill[len(prompt)].append(measured.worker.call("prefill", prompt))
        self._take_stock()

    def _decode(self, context: int) -> None:
        new_tokens, what = self.settings.new_tokens, f"decoding at {context}"
        for measured in self.everyone:
            self._tell(f"{what}: filling the context of {measured.name}", 0, 1)
            measured.worker.call("fill", self._tokens[:context])
            measured.worker.call("decode", context, new_tokens)  # to warm up and to compile what needs it
        assert self.reader is not None
        contenders: list[Measured | ReadBandwidth] = [*self.everyone, self.reader]
        for turn in self._turns(what, contenders):
            if isinstance(turn, ReadBandwidth):
                self.beside[context].append(turn.once())
            else:
                turn.decode[context].append(turn.worker.call("decode", context, new_tokens))
        self._take_stock()

    def _turns(self, what: str, everyone: Sequence[Turn]) -> Iterator[Turn]:
        repeats = self.settings.repeats
        rounds, seconds = (ROUNDS, LONGEST) if repeats is None else (repeats, math.inf)
        for i, turn in turns(everyone, rounds, seconds=seconds, least=LEAST_ROUNDS):
            self._tell(what, i, rounds)
            yield turn

    def _compare_outputs(self) -> None:
        """The greedy continuations of one prompt; on the way, how long a first answer takes."""
        prompt = self._tokens[: self.settings.prompt_lengths[0]]
        for measured in self.everyone:
            self._tell(f"first token of {measured.name}", 0, 1)
            began = time.perf_counter()
            measured.worker.call("greedy", prompt, 1)
            measured.first_token = time.perf_counter() - began
        if not self.peers:
            return
        outputs = [
            measured.worker.call("greedy", self._tokens[:GREEDY_PROMPT], GREEDY_TOKENS)
            for measured in (self.own[0], *self.peers)
        ]
        for measured, output in zip(self.peers, outputs[1:], strict=True):
            measured.agreement = _common_beginning(outputs[0], output)

    def _take_stock(self) -> None:
        for measured in self.everyone:
            measured.peak_memory = measured.worker.call("peak_memory")
            if measured.name == "transformers":
                measured.chosen = measured.worker.call("chosen")

    def _open(self, name: str, factory: Callable[..., Any], opening: Opening, *rest: Any) -> Measured:
        self._tell(f"loading {name}", 0, 1)
        worker = Worker(name, factory, opening, *rest)
        self._resources.callback(worker.close)
        return Measured(name, opening.plan, worker.call("facts"), worker)

    def _gguf(self) -> Path:
        """The checkpoint, if llama.cpp can take it as it is, else a file written for this run."""
        opening = self.settings.opening
        if own := own_gguf(opening):
            return own
        self._tell(f"writing the weights as {ggml_type(opening)} for llama.cpp", 0, 1)
        folder = self._resources.enter_context(tempfile.TemporaryDirectory(prefix="minisa-"))
        path = Path(folder) / f"{ggml_type(opening)}.gguf"
        Worker("llama.cpp", write_gguf, opening, path).close()
        return path

    def _ceiling(self, reader: ReadBandwidth) -> Ceiling:
        opening = self.settings.opening
        # A processor without instructions for a narrow dtype multiplies it as fp32, which torch by itself does not.
        rates = [matrix_rates(opening.device, dtype) for dtype in {opening.dtype, torch.float32}]
        return Ceiling([reader.once() for _ in range(READINGS)], max(rates, key=statistics.median))


def _common_beginning(left: Sequence[int], right: Sequence[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=True)) if a != b), len(left))


def _into_page_cache(path: Path) -> None:
    """Read a checkpoint once, so that whoever loads first does not wait for the disk on everybody's behalf."""
    files = [path] if path.is_file() else [file for file in path.iterdir() if file.is_file()]
    if sum(file.stat().st_size for file in files) > free_memory(torch.device("cpu")) // 2:
        return
    for file in files:
        with file.open("rb") as stream:
            while stream.read(1 << 24):
                pass
