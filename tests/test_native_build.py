"""When the C++ step is built and by whom, and which models get it."""

from __future__ import annotations

import ctypes
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from minisa.cache import StaticCache
from minisa.device import choose_dtype
from minisa.model import Transformer
from minisa.runners.choice import choose_runner, may_become_native, native_step
from minisa.runners.native import build
from minisa.runners.native.build import compiler_works, open_library
from minisa.runners.native.packing import Packed, pack_bf16
from minisa.runners.native.runner import supports
from minisa.sharing import SharingPlan
from tests.engines import byte_llm
from tests.models import build_model
from tests.tiny import tiny_config

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

GQA = tiny_config(n_layers=6, dim=128, n_heads=6, n_kv_heads=2, head_dim=32, hidden_dim=160, vocab_size=256)
UNFIT = tiny_config(dim=80, n_heads=5, n_kv_heads=1, head_dim=16)


def test_unfit_shapes_and_dtypes_stay_with_pytorch() -> None:
    assert supports(GQA)
    assert not supports(UNFIT)
    for config in (GQA, UNFIT):
        model = build_model(config, SharingPlan.none(config.n_layers))  # fp32
        assert choose_runner(model).name == "eager"


@pytest.fixture
def bf16_model() -> Transformer:
    model = build_model(GQA, SharingPlan.none(6))
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    return model


@pytest.fixture
def nothing_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of caches of a machine on which no library has been built yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build.library_path.cache_clear()
    yield tmp_path
    build.library_path.cache_clear()


def test_eager_first_and_native_once_it_is_built(bf16_model: Transformer, nothing_built: Path) -> None:
    """A new machine: the first choice does not wait for the compiler, a later one finds the library."""
    runner = choose_runner(bf16_model)
    assert runner.name == "eager"
    assert may_become_native(runner, None)
    assert not may_become_native(runner, False)
    deadline = time.monotonic() + 120
    while not list(nothing_built.rglob("*.so")):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert not list(nothing_built.rglob("*.part"))
    assert choose_runner(bf16_model).name == "C++ step"


def test_what_pytorch_computed_does_not_stay_in_the_cache(
    bf16_model: Transformer, library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A text that goes on from a prompt, and one that begins with a prefix, from before the step was built."""
    beginning = "The quick brown fox jumps over the lazy dog, and "
    cache = StaticCache.allocate(bf16_model.config, bf16_model.plan, max_seq_len=96, dtype=torch.bfloat16)
    monkeypatch.setattr("minisa.runners.choice.open_library", lambda wait: None)
    llm = byte_llm(bf16_model, cache)
    list(llm.generate(beginning, max_new_tokens=1))
    prefix = llm.prefix(beginning)
    assert llm.runner.name == "eager"
    monkeypatch.setattr("minisa.runners.choice.open_library", lambda wait: library)

    def kept(**options: Any) -> tuple[Tensor, int]:
        *_, last = llm.generate(beginning + "runs", max_new_tokens=1, **options)
        return llm.cache.keys[:, :, :, : len(beginning)].clone(), last.stats.reused_tokens  # type: ignore[union-attr]

    found, reused = kept()
    assert llm.runner.name == "C++ step"
    assert reused == 0
    llm.logits([1])
    llm.cache.tokens[0].clear()
    assert torch.equal(kept()[0], found)
    llm.cache.tokens[0].clear()
    found_behind, reused = kept(prefix=prefix)
    assert reused == len(beginning)
    assert torch.equal(found_behind, found)


def test_an_interrupt_leaves_no_model_half_packed(
    bf16_model: Transformer, library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waits until the weights have moved into the step that has been built meanwhile."""
    cache = StaticCache.allocate(bf16_model.config, bf16_model.plan, max_seq_len=32)
    monkeypatch.setattr("minisa.runners.choice.open_library", lambda wait: None)
    llm = byte_llm(bf16_model, cache)
    list(llm.generate("a", max_new_tokens=2))
    assert llm.cache.tokens[0] != []
    monkeypatch.setattr("minisa.runners.choice.open_library", lambda wait: library)
    packing = []

    def interrupted(weight: Tensor) -> Packed:
        packing.append(weight)
        if len(packing) == 2:
            signal.raise_signal(signal.SIGINT)
        return pack_bf16(weight)

    monkeypatch.setattr("minisa.runners.native.runner.pack_bf16", interrupted)
    with pytest.raises(KeyboardInterrupt):
        next(llm.generate("a"))
    assert llm.runner.name == "C++ step"
    assert llm.cache.tokens[0] == []
    assert llm.logits([1, 2]).isfinite().all()


def test_auto_is_bf16_on_any_cpu_once_the_step_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without instructions for bf16 PyTorch multiplies it a hundred times slower than fp32; the C++ step does not."""
    monkeypatch.setattr("minisa.device._cpu_multiplies_bf16", lambda: False)
    cpu = torch.device("cpu")
    assert choose_dtype("auto", cpu) == torch.float32
    assert choose_dtype("auto", cpu, native=True) == torch.bfloat16
    assert choose_dtype("fp32", cpu, native=True) == torch.float32


def test_who_waits_for_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[bool] = []
    monkeypatch.setattr("minisa.runners.choice.open_library", lambda *, wait: waits.append(wait))
    cpu, config = torch.device("cpu"), GQA
    for compile in (None, True):
        for quantized in (False, True):
            native_step(config, cpu, compile=compile, quantized=quantized)
    assert waits == [False, True, True, True]
    native_step(config, cpu, compile=False, quantized=True)
    native_step(config, torch.device("cuda"), compile=True, quantized=False)
    native_step(UNFIT, cpu, compile=True, quantized=False)
    assert len(waits) == 4


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_without_a_working_compiler_everything_stays_eager(
    compiler: str, bf16_model: Transformer, nothing_built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", compiler)
    assert open_library(wait=True) is None
    assert choose_runner(bf16_model).name == "eager"
    assert not list(nothing_built.rglob("*.so"))


@pytest.fixture
def fake_compiler(nothing_built: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """fake_compiler(script): a shell script that is called in place of the compiler."""

    def install(script: str) -> None:
        file = nothing_built / "compiler"
        file.write_text(f"#!/bin/sh\n{script}\n")
        file.chmod(0o755)
        monkeypatch.setenv("CXX", str(file))

    return install


COPY = 'while [ "$1" != -o ]; do shift; done; cp "{}" "$2"'  # a library that was built before


def test_a_compiler_is_started_once(
    fake_compiler: Callable[[str], None], bf16_model: Transformer, nothing_built: Path
) -> None:
    """Not again while it works, however many generations ask, nor after it has failed."""
    log = nothing_built / "log"
    fake_compiler(f"echo started >> {log}; sleep 1; exit 1")
    assert [choose_runner(bf16_model).name for _ in range(3)] == ["eager"] * 3
    assert open_library(wait=True) is None  # it has failed by now
    assert choose_runner(bf16_model).name == "eager"
    assert log.read_text() == "started\n"


def test_the_compiler_may_be_several_words(
    library: ctypes.CDLL, fake_compiler: Callable[[str], None], nothing_built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As $CXX may be elsewhere: `ccache g++`, or nothing, which is g++."""
    fake_compiler(COPY.format(library._name))
    monkeypatch.setenv("CXX", f"env {nothing_built / 'compiler'}")
    assert open_library(wait=True) is not None
    assert not compiler_works()  # torch.compile's, which takes it for one word
    monkeypatch.setenv("CXX", "")
    assert build._compiler() == ("g++",)


def test_a_relative_cache_folder_is_none(nothing_built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is loaded from there must not depend on the folder one is in."""
    monkeypatch.setenv("XDG_CACHE_HOME", nothing_built.name)
    monkeypatch.chdir(nothing_built.parent)
    path = build.library_path()
    assert path is not None and path.is_relative_to(Path.home())


def test_a_damaged_library_is_built_again(
    library: ctypes.CDLL, fake_compiler: Callable[[str], None], nothing_built: Path
) -> None:
    fake_compiler(COPY.format(library._name))
    damaged = build.library_path()
    assert damaged is not None
    assert damaged.is_relative_to(nothing_built)
    damaged.parent.mkdir()
    damaged.write_bytes(b"\x7fELF")
    assert open_library(wait=True) is not None
