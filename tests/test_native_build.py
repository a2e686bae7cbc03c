"""How the C++ step is built, and which models get it."""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from minisa.device import choose_dtype
from minisa.model import Transformer
from minisa.runners.choice import choose_runner, native_library
from minisa.runners.native.build import open_library
from minisa.runners.native.runner import supports
from minisa.sharing import SharingPlan
from tests.models import build_model
from tests.tiny import tiny_config

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

GQA = tiny_config(n_layers=6, dim=128, n_heads=6, n_kv_heads=2, head_dim=32, hidden_dim=160, vocab_size=256)
UNFIT = tiny_config(dim=80, n_heads=5, n_kv_heads=1, head_dim=16)
CPU = torch.device("cpu")


@pytest.fixture
def bf16_model() -> Transformer:
    return build_model(GQA, SharingPlan.none(6)).bfloat16()


@pytest.fixture
def new_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The cache folder of a machine on which nothing has been built yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    open_library.cache_clear()
    yield tmp_path
    open_library.cache_clear()


@pytest.fixture
def fake_compiler(new_machine: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """fake_compiler(script): $CXX is a shell script, behind `env`. Returns a file with a line for each of its runs."""

    def install(script: str) -> Path:
        file, log = new_machine / "compiler", new_machine / "log"
        file.write_text(f"#!/bin/sh\necho run >> {log}\n{script}\n")
        file.chmod(0o755)
        monkeypatch.setenv("CXX", f"env {file}")
        return log

    return install


OUTPUT = 'while [ "$1" != -o ]; do shift; done; '  # $2 is then where the library goes


def test_it_is_built_before_the_first_answer_and_found_from_then_on(
    bf16_model: Transformer, new_machine: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    library = native_library(GQA, CPU, None)
    assert choose_runner(bf16_model, None, library).name == "C++ step"
    assert "building the C++ step" in capfd.readouterr().err
    assert len(list(new_machine.rglob("*.*"))) == 1  # and no file of the compiler's
    open_library.cache_clear()
    assert native_library(GQA, CPU, True) is not None
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("script", "why"),
    [("echo 'error: no such flag' >&2; exit 1", "error: no such flag"), (OUTPUT + 'echo half > "$2"; kill $$', "env")],
)
def test_a_compiler_that_fails_leaves_pytorch_and_no_file(
    script: str, why: str, bf16_model: Transformer, fake_compiler: Callable[[str], Path], new_machine: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    log = fake_compiler(script)
    for _ in range(2):
        assert native_library(GQA, CPU, None) is None
    assert log.read_text() == "run\n"  # a process tries once
    assert f"no C++ step, PyTorch runs instead: install g++ or set CXX ({why}" in capfd.readouterr().err
    assert not [*new_machine.rglob("*.so"), *new_machine.rglob("*.part")]
    assert choose_runner(bf16_model).name == "eager (no C++ compiler)"


def test_an_interrupted_build_leaves_no_file(
    fake_compiler: Callable[[str], Path], new_machine: Path, library: ctypes.CDLL
) -> None:
    """Ctrl-C comes to the compiler too, which has written half of it; the next process builds it whole."""
    fake_compiler(OUTPUT + 'echo half > "$2"; kill -INT $PPID; sleep 1')
    with pytest.raises(KeyboardInterrupt):
        open_library()
    assert not [*new_machine.rglob("*.so"), *new_machine.rglob("*.part")]
    fake_compiler(OUTPUT + f'cp "{library._name}" "$2"')
    assert open_library() is not None


def test_no_compiler_at_all(bf16_model: Transformer, new_machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert native_library(GQA, CPU, True) is None
    assert choose_runner(bf16_model, True).name == "eager (no C++ compiler)"
    assert choose_runner(bf16_model, False).name == "eager"


def test_a_relative_cache_folder_is_none(
    fake_compiler: Callable[[str], Path], library: ctypes.CDLL, new_machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is loaded from there must not depend on the folder one is in."""
    fake_compiler(OUTPUT + f'cp "{library._name}" "$2"')
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    monkeypatch.setenv("HOME", str(new_machine / "home"))
    opened = open_library()
    assert opened is not None and Path(opened._name).is_relative_to(new_machine / "home" / ".cache" / "minisa")


def test_which_models_are_run_in_it(bf16_model: Transformer, library: ctypes.CDLL) -> None:
    assert supports(GQA) and not supports(UNFIT)
    assert native_library(UNFIT, CPU, True) is None
    assert native_library(GQA, CPU, False) is None
    assert native_library(GQA, torch.device("cuda"), None) is None
    assert native_library(GQA, CPU, None, "fp32") is native_library(GQA, CPU, None, torch.float32) is None
    assert native_library(GQA, CPU, None, torch.bfloat16) is not None
    assert choose_runner(build_model(GQA, SharingPlan.none(6)), None, library).name == "eager"  # fp32
    assert choose_runner(bf16_model, None, library).name == "C++ step"


def test_auto_is_bf16_on_any_cpu_with_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without instructions for bf16 PyTorch multiplies it a hundred times slower than fp32; the C++ step does not."""
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: False)
    assert choose_dtype("auto", CPU) == torch.float32
    assert choose_dtype("auto", CPU, native=True) == torch.bfloat16
    for name in ("fp32", "float32", torch.float32):
        assert choose_dtype(name, CPU, native=True) == torch.float32
