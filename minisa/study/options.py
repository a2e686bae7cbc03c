"""The flags that study commands have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from minisa.console import OutputFile

Command = TypeVar("Command", bound=Callable[..., Any])

TEXTS = click.option(
    "--text", "texts", metavar="FILE", multiple=True, required=True, help="UTF-8 text; may be given repeatedly."
)
LENGTH = click.option("--length", type=click.IntRange(2), default=512, show_default=True, help="Tokens of a window.")
SEED = click.option(
    "--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="Draws the windows of text."
)
PLAN = click.option(
    "--sa",
    required=True,
    metavar="SPANS|PLAN.json",
    help="The plan: followers as 27-30 or 3:6,19:21, or a plan's file.",
)


def plan_file(default: str) -> Callable[[Command], Command]:
    """Decorator: --out, the plan file to write."""
    return click.option(
        "--out", type=OutputFile(".json"), default=default, show_default=True, help="The plan file to write."
    )
