"""Some tens of turns of tests/soak.py on a tiny model: interrupts anywhere, memory flat, answers a fresh session's."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("runner", "flags"),
    [
        ("eager", ("--sa", "0:1,2:3", "--speculate")),
        ("C++ step", ("--compile", "--sa", "0:1,2:3", "--speculate")),
    ],
    ids=["eager", "C++ step"],
)
def test_a_session_with_interrupts(runner: str, flags: tuple[str, ...]) -> None:
    """In a process of its own, whose memory no other test has left holes in."""
    if runner == "C++ step" and shutil.which("g++") is None:
        pytest.skip("needs g++")
    command = [sys.executable, "-m", "tests.soak", "--turns", "40", "--every", "2", *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, cwd=Path(__file__).parents[1], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    name, *rest = ran.stdout.splitlines()
    assert name == runner
    lines = [line.split(maxsplit=4) for line in rest]  # turns, "turns", memory, "MiB", counts
    counts = ast.literal_eval(lines[-1][4])
    assert counts["compared"] > 10
    assert counts["interrupted"] > 2
    assert counts["turns dropped"] > 10
    memory = {int(turns): float(mebibytes) for turns, _, mebibytes, *_ in lines}
    assert memory[40] - memory[12] < 1
