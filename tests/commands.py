"""Command lines in this process, as a shell runs them: what they print and how they end."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NamedTuple

import click
import pytest

from minisa import console

FRANCE = "What is the capital of France?"


class Ran(NamedTuple):
    status: int
    out: str
    err: str


@pytest.fixture
def run_main(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """run_main(main, *arguments): a command line whose first word is the program's name."""

    def run(main: click.Command, *arguments: object) -> Ran:
        monkeypatch.setattr(sys, "argv", list(map(str, arguments)))
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit_:
            console.run(main)
        sys.stdout.flush()
        out, err = capfd.readouterr()
        return Ran(exit_.value.code, out, err)  # type: ignore[arg-type]

    return run
