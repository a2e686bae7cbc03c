"""Some tens of turns of tests/soak.py on a tiny model: interrupts anywhere, memory flat, answers a fresh session's."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("runner", "flags"),
    [
        ("eager", ()),
        ("eager", ("--sa", "0:1,2:3", "--speculate")),
        ("C++ step", ("--compile", "--sa", "0:1,2:3", "--speculate")),
    ],
    ids=["plain", "shared and speculating", "the same in C++"],
)
def test_a_session_with_interrupts(runner: str, flags: tuple[str, ...]) -> None:
    """In a process of its own, whose memory no other test has left holes in."""
    if runner == "C++ step" and shutil.which("g++") is None:
        pytest.skip("needs g++")
    command = [sys.executable, "-m", "tests.soak", "--turns", "30", "--every", "2", "--seed", "1"]
    command += ["--max-new-tokens", "10", *flags]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, cwd=ROOT, env=one_thread, capture_output=True, check=False, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    name, *rest = ran.stdout.splitlines()
    assert name == runner
    lines = [line.split(maxsplit=4) for line in rest]  # turns, "turns", memory, "MiB", counts
    counts = ast.literal_eval(lines[-1][4])
    assert counts["compared"] > 10
    assert counts["interrupted between chunks"] > 2
    assert counts["turns dropped"] > 10
    memory = {int(turns): float(mebibytes) for turns, _, mebibytes, *_ in lines}
    assert memory[30] - memory[9] < 1
