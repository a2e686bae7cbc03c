"""Builds step.cpp once for each version of it and each kind of processor."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import uuid
from pathlib import Path

from minisa.errors import MinisaError
from minisa.files import cache_dir

FLAGS = ("-std=c++20", "-O3", "-march=native", "-mtune=generic", "-shared", "-fPIC", "-pthread")
SOURCES = Path(__file__).parent


def open_library(*, wait: bool) -> ctypes.CDLL | None:
    """The library, if it is built already or there is time to `wait` for it; else None, and the build begins.

    Nobody has to stay for a build that was begun: it is a process of its own, and moves its result into place whole.
    None also where there is no compiler, none that understands these flags, or no place to keep the result.
    """
    target = library_path()
    if target is None or shutil.which(_compiler()[0]) is None:
        return None
    if library := _load(target):
        return library
    build = _start(_compiler(), target)
    if build is None or (build.wait() if wait else build.poll()) != 0:
        return None
    return _load(target)


def compiler_works() -> bool:
    """Whether torch.compile can compile C++ for a CPU here. It takes $CXX for one word."""
    command = [os.environ.get("CXX", "g++"), "-x", "c++", "-fsyntax-only", "-"]
    try:
        return subprocess.run(command, input=b"#include <cmath>", capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def _compiler() -> tuple[str, ...]:
    """The command in $CXX, which may be several words (`ccache g++`), or g++."""
    return tuple(os.environ.get("CXX", "").split()) or ("g++",)


@functools.cache
def library_path() -> Path | None:
    """Where the library for these sources, flags and processor is kept; None without a home folder."""
    key = hashlib.sha256("\0".join([*_compiler(), *FLAGS, _processor()]).encode())
    for source in sorted([*SOURCES.glob("*.cpp"), *SOURCES.glob("*.h")]):
        key.update(source.read_bytes())
    try:
        return cache_dir() / f"step-{key.hexdigest()[:16]}.so"
    except MinisaError:
        return None


@functools.cache  # once in a process: nobody starts it again while it runs, or where it failed
def _start(compiler: tuple[str, ...], target: Path) -> subprocess.Popen[bytes] | None:
    part = target.with_suffix(f".{uuid.uuid4().hex[:8]}.part")
    command = [*compiler, *FLAGS, str(SOURCES / "step.cpp"), "-o", str(part)]
    script = '"$@" && mv "$PART" "$TARGET" || { rm -f "$PART"; exit 1; }'
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        return subprocess.Popen(
            ["sh", "-c", script, "sh", *command],
            env={**os.environ, "PART": str(part), "TARGET": str(target)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C in the chat is not meant for the compiler
        )
    except OSError:
        return None


def _load(target: Path) -> ctypes.CDLL | None:
    """None where it is not built yet, is damaged, or is for a machine that is not this one after all."""
    try:
        library = ctypes.CDLL(str(target))
    except OSError:
        return None
    pointer, integer = ctypes.c_void_p, ctypes.c_int
    library.engine_open.argtypes, library.engine_open.restype = [pointer, integer, integer], pointer
    library.engine_step.argtypes = [*[pointer] * 6, integer, integer, pointer]
    library.engine_step.restype = None
    library.engine_close.argtypes, library.engine_close.restype = [pointer], None
    return library


def _processor() -> str:
    """What -march=native looks at: the processor's features, where the system tells them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return platform.machine() + platform.processor()
