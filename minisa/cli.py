"""python -m minisa: fetch models, look at plans, check a machine, study sharing."""

from __future__ import annotations

from importlib import import_module

import click

from minisa.console import MODEL, OutputFile, fetch, fetch_default
from minisa.costs import kv_bytes, parameter_count
from minisa.models.registry import choose_plan, find, local_path, registry, resolve
from minisa.sharing import SharingPlan

ELSEWHERE = {
    "baselines": "minisa.study.baselines_command:baselines",
    "eval": "minisa.study.eval_command:evaluate",
    "heal": "minisa.study.heal_command:heal",
    "isotropy": "minisa.study.isotropy_command:isotropy",
    "refit": "minisa.study.refit_command:refit",
    "search": "minisa.study.search_command:search",
    "selfcheck": "minisa.benchmark.selfcheck_command:selfcheck",
}


class Commands(click.Group):
    """The commands of this file, and those ELSEWHERE, which are imported only when they are asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted([*self.commands, *ELSEWHERE])

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in ELSEWHERE:
            return super().get_command(ctx, name)
        module, _, attribute = ELSEWHERE[name].partition(":")
        return getattr(import_module(module), attribute)


@click.group(cls=Commands, invoke_without_command=True)
@click.pass_context
def main(context: click.Context) -> None:
    """Fetch models, look at sharing plans, check a machine. To talk to a model: chat.py; to measure one: bench.py."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@main.command()
@click.argument("name")
def pull(name: str) -> None:
    """Download the model NAME; `python -m minisa models` lists them."""
    entry = find(name)
    path = local_path(entry)
    state = f"is there already: {path}" if path is not None else f"is ready: {fetch(entry)}"
    click.echo(f"{entry.name} {state}", err=True)


@main.command()
def models() -> None:
    """List the models of weights/models.toml, and which of them are here."""
    for entry in registry().values():
        here = "here" if local_path(entry) is not None else "gated" if entry.gated else ""
        click.echo(f"{entry.name:<28}{entry.size / 1e9:>8.2f} GB  {here:<6} {entry.licence}")


@main.command()
@click.argument("spans", default="default")
@MODEL
@click.option("--save", type=OutputFile(".json"), help="Write the plan to this JSON file.")
def plan(spans: str, model: str, save: str | None) -> None:
    """Show what SPANS share in a model, and what that saves: 27-30, 3:6,19:21, none, default or a JSON file."""
    from minisa.checkpoint import open_checkpoint

    fetch_default(model)
    path, entry = resolve(model)
    config = open_checkpoint(path).config
    chosen, plain = choose_plan(spans, config, entry), SharingPlan.none(config.n_layers)
    slot, plain_slot = (kv_bytes(config, p, 1, 2) for p in (chosen, plain))
    weights, plain_weights = (parameter_count(config, p) for p in (chosen, plain))
    click.echo(f"plan {chosen}: {len(chosen.followers)} of {config.n_layers} layers follow")
    click.echo(chosen.picture())
    click.echo(f"KV cache   {slot:,} of {plain_slot:,} bytes a token in bf16 ({slot / plain_slot - 1:+.1%})")
    click.echo(f"weights    {weights:,} of {plain_weights:,} ({weights / plain_weights - 1:+.1%})")
    if save is not None:
        chosen.save(save)
