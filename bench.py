"""How fast, how near to the hardware's limit, in how much memory: `python bench.py`."""

from __future__ import annotations

import json
from typing import Any

import click
from click.core import ParameterSource

from minisa.interrupts import end_without_traceback

if __name__ == "__main__":
    end_without_traceback()

from minisa.benchmark.presets import CONTEXTS, PEERS, PROMPT_LENGTHS
from minisa.console import OutputFile, fetch_default, keep_apart, model_options, run, write_json
from minisa.errors import MinisaError


class Lengths(click.ParamType):
    """Whole numbers with commas between them, such as 0,512,1500."""

    name = "N,N,…"

    def __init__(self, least: int) -> None:
        self.least = least

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        try:
            lengths = tuple(int(part) for part in value.split(","))
        except ValueError:
            lengths = ()
        if not lengths or min(lengths) < self.least:
            self.fail(f"{value!r}: expected whole numbers from {self.least} on, such as 512,1500", param, ctx)
        return lengths


def default(lengths: tuple[int, ...]) -> str:
    return f"[default: {','.join(map(str, lengths))}, as far as the model's context reaches]"


@click.command()
@model_options
@click.option("--batch", type=click.IntRange(1, 1 << 16), default=1, show_default=True, help="Rows decoded at once.")
@click.option("--contexts", type=Lengths(0), help=f"Tokens in the cache when decoding. {default(CONTEXTS)}")
@click.option("--prompt-lengths", type=Lengths(1), help=f"Tokens to prefill. {default(PROMPT_LENGTHS)}")
@click.option("--new-tokens", type=click.IntRange(1), default=16, show_default=True, help="Decoded in each turn.")
@click.option("--repeats", type=click.IntRange(1), help="Turns of each; by default 8, fewer where they take long.")
@click.option("--compile/--no-compile", default=None, help="Compiled steps, or eager PyTorch; by default as `load`.")
@click.option("--threads", type=click.IntRange(1, 1024), help="CPU threads, of the ceiling and the peers too.")
@click.option("--random-weights", metavar="SHAPE", help="Noise in place of a checkpoint: a preset, or a config.json.")
@click.option("--against", type=click.Choice(list(PEERS)), multiple=True, help="Compare, on the same weights.")
@click.option("--json", "json_path", type=OutputFile(), help="Write the record to this file.")
@click.option("--plot", "plot_path", type=OutputFile(), help="Draw it into this PNG.")
@click.pass_context
def main(context: click.Context, json_path: str | None, plot_path: str | None, **flags: Any) -> None:
    """Measure a model, plain and with Shared Attention (--sa; the model's own plan by default; --sa none for plain
    alone), against the ceiling of this machine and, if asked, against others.

    Configurations take turns in one run, each in a process of its own. The last line is the record as JSON.
    """
    from minisa.benchmark import plot, table
    from minisa.benchmark.report import record
    from minisa.benchmark.run import Benchmark
    from minisa.benchmark.settings import choose

    if flags["random_weights"] is not None and context.get_parameter_source("model") is ParameterSource.COMMANDLINE:
        raise MinisaError("--random-weights names the model itself: leave out --model")
    if plot_path is not None:
        plot.check_matplotlib()
    read = [(f"--{name}", flags[name.replace("-", "_")]) for name in ("model", "sa", "random-weights")]
    keep_apart({"--json": json_path, "--plot": plot_path}, *read)
    if flags["random_weights"] is None:
        fetch_default(flags["model"])
    with Benchmark(choose(**flags), lambda what: click.echo(what, err=True)) as benchmark:
        interrupted = True
        try:
            benchmark.open()
            benchmark.measure_ceiling()
            click.echo(table.heading(record(benchmark)))
            benchmark.measure()
            interrupted = False
        finally:
            if any(cell.rounds for cell in benchmark.cells):
                found = record(benchmark, interrupted)
                click.echo(f"\n{table.results(found)}\n")
                click.echo(json.dumps(found))
                if json_path is not None:
                    write_json(json_path, found)
                if plot_path is not None:
                    plot.plot(found, plot_path)


if __name__ == "__main__":
    run(main)
