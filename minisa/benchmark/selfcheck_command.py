"""python -m minisa selfcheck: whether this machine computes what the reference computes."""

from __future__ import annotations

import click

from minisa.console import DEVICE


@click.command()
@DEVICE
@click.option("--bench/--no-bench", default=True, show_default=True, help="Measure a shape that fits this machine too.")
def selfcheck(device: str, bench: bool) -> int:
    """Check that this machine's kernels, compiled steps and models compute what the reference computes.

    Exit status 1 if anything does not. Ends with the record of a short benchmark as JSON.
    """
    import torch

    from minisa.benchmark.report import device_name
    from minisa.benchmark.selfcheck import run_checks
    from minisa.benchmark.short import short_bench
    from minisa.device import choose_device

    target = choose_device(device)
    click.echo(f"{target} ({device_name(target)}), torch {torch.__version__}")
    failed = False
    for outcome in run_checks(target):
        verdict = {True: "passed", False: "FAILED", None: "left out"}[outcome.passed]
        click.echo(f"{outcome.name:<20}{verdict:<10}{outcome.seconds:>4.0f} s  {outcome.detail}")
        failed |= outcome.passed is False
    if bench:
        click.echo(short_bench(target))
    return int(failed)
