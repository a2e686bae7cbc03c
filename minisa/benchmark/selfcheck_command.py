"""python -m minisa selfcheck: whether this machine computes what the reference computes, and how fast."""

from __future__ import annotations

import json

import click

from minisa.console import DEVICE

LARGE, LARGE_BYTES = "llama3-8b", 40 << 30  # plain and shared are loaded at once, 16 GB each


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


def short_bench(device: object) -> str:
    """Plain against shared in half of the layers of a shape with random weights: the tables, then the record."""
    import torch

    from minisa.benchmark import table
    from minisa.benchmark.report import record
    from minisa.benchmark.run import Benchmark
    from minisa.benchmark.settings import choose
    from minisa.device import free_memory

    assert isinstance(device, torch.device)
    if device.type == "cuda" and free_memory(device) >= LARGE_BYTES:
        shape, sa, contexts, prompts = LARGE, "16:17-31", (1000, 7000), (4096,)
    else:
        shape, sa, contexts, prompts = "smollm2-135m", "14:15-29", (0, 500), (256,)
    lengths = {"contexts": contexts, "prompt_lengths": prompts}
    settings = choose(random_weights=shape, sa=sa, device=str(device), repeats=3, **lengths)  # type: ignore[arg-type]
    with Benchmark(settings, lambda what: None) as benchmark:
        benchmark.open()
        benchmark.measure_ceiling()
        benchmark.measure()
        found = record(benchmark)
    return "\n\n".join((table.heading(found), table.results(found), json.dumps(found)))
