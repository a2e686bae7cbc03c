"""Builds step.cpp with the machine's compiler, once for each version of it and each kind of processor."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import subprocess
import sys
from pathlib import Path

from minisa.files import cache_dir

FLAGS = ("-std=c++20", "-O3", "-march=native", "-mtune=generic", "-shared", "-fPIC", "-pthread")
SOURCES = Path(__file__).parent


@functools.cache
def open_library() -> ctypes.CDLL | None:
    """The C++ step, built now if this machine has not built it yet; a line on stderr says so, as it takes seconds.

    None where it cannot be built; the line then says why. The compiler is $CXX, which may be several words, or g++.
    """
    compiler = os.environ.get("CXX", "").split() or ["g++"]
    target = cache_dir() / f"step-{_key(compiler)}.so"
    try:
        if not target.exists():
            print("minisa: building the C++ step for this processor (once; it takes some seconds)", file=sys.stderr)
            _build(compiler, target)
        library = ctypes.CDLL(str(target))
    except OSError as error:
        print(f"minisa: no C++ step, PyTorch runs instead: install g++ or set CXX ({error})", file=sys.stderr)
        return None
    pointer, integer = ctypes.c_void_p, ctypes.c_int
    library.engine_open.argtypes, library.engine_open.restype = [pointer, integer, integer], pointer
    library.engine_step.argtypes = [*[pointer] * 6, integer, integer, pointer]
    library.engine_step.restype = None
    library.engine_close.argtypes, library.engine_close.restype = [pointer], None
    return library


def _build(compiler: list[str], target: Path) -> None:
    """Raises OSError. Whatever ends it, target is whole or not there."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_suffix(f".{os.getpid()}.part")
    try:
        command = [*compiler, *FLAGS, str(SOURCES / "step.cpp"), "-o", str(part)]
        ran = subprocess.run(command, check=False, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if ran.returncode != 0:
            errors = (line for line in ran.stderr.splitlines() if "error" in line)
            raise OSError(next(errors, f"{compiler[0]} ended with status {ran.returncode}"))
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


def _key(compiler: list[str]) -> str:
    """Of the sources, the command and what -march=native looks at: the processor's features."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        processor = platform.machine() + platform.processor()
    key = hashlib.sha256("\0".join([*compiler, *FLAGS, processor]).encode())
    for source in sorted([*SOURCES.glob("*.cpp"), *SOURCES.glob("*.h")]):
        key.update(source.read_bytes())
    return key.hexdigest()[:16]
