"""bench.py in this process, and tiny models for it: what tests of its record and of its flags share."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import bench
from minisa.benchmark import measure
from minisa.benchmark import run as benchmark_run
from minisa.config import RopeScaling
from minisa.sharing import SharingPlan
from tests import commands
from tests.loadable import N_TOKENS, loadable_gguf
from tests.tiny import random_weights, tiny_config, write_hf

QUICK = ("--contexts", "0,20", "--prompt-lengths", "8,24", "--new-tokens", 3, "--repeats", 2, "--dtype", "fp32")
CONFIG = tiny_config(vocab_size=N_TOKENS, tie_embeddings=True)
PLAN = SharingPlan.parse("1:2-3", CONFIG.n_layers)


class Ran(commands.Ran):
    @property
    def record(self) -> dict[str, Any]:
        return json.loads(self.out.splitlines()[-1])

    def configuration(self, name: str) -> dict[str, Any]:
        return next(found for found in self.record["configurations"] if found["name"] == name)

    def cells(self, name: str, kind: str) -> list[dict[str, Any]]:
        return [cell for cell in self.record["cells"] if (cell["configuration"], cell["kind"]) == (name, kind)]


Bench = Callable[..., Ran]


@pytest.fixture
def run_bench(run_main: Callable[..., commands.Ran], monkeypatch: pytest.MonkeyPatch) -> Bench:
    """run_bench(*flags): bench.py's main in this process, as the command line runs it; its workers are processes."""
    monkeypatch.setitem(measure.BUFFER, "cpu", 4 << 20)
    monkeypatch.setattr(measure, "MAX_MATRIX", 256)
    threads = torch.get_num_threads()

    def run(*flags: object) -> Ran:
        try:
            return Ran(*run_main(bench.main, "bench.py", *flags))
        finally:
            torch.set_num_threads(threads)

    return run


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Workers that are no processes; the list of what they serve."""
    served = []

    class Inline:
        def __init__(self, name: str, factory: Callable[..., Any], *arguments: Any) -> None:
            self.served = factory(*arguments)
            served.append(self.served)

        def call(self, method: str, *arguments: Any) -> Any:
            return getattr(self.served, method)(*arguments)

        def close(self) -> None:
            pass

    monkeypatch.setattr(benchmark_run, "Worker", Inline)
    return served


@pytest.fixture(scope="module")
def bench_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A loadable model of four layers with a tokenizer."""
    return loadable_gguf(tmp_path_factory.mktemp("bench") / "tiny.gguf", CONFIG)


@pytest.fixture(scope="module")
def untrained_shape(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config.json of a model that nobody trained: another RoPE, an output head of its own."""
    yarn = RopeScaling("yarn", 8.0, original_max_seq_len=64, attention_factor=2.0)
    config = tiny_config(rope_scaling=yarn, tie_embeddings=False)
    return write_hf(tmp_path_factory.mktemp("shape"), config, random_weights(config)) / "config.json"
