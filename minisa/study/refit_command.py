"""python -m minisa refit: output matrices that make up for what a plan changed, in closed form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from minisa.console import DEVICE, MODEL, open_model
from minisa.study.options import LENGTH, PLAN, SEED, TEXTS, plan_file


@click.command()
@MODEL
@PLAN
@TEXTS
@click.option("--tokens", type=click.IntRange(1), default=32768, show_default=True, help="Tokens to fit to.")
@click.option("--held-out-tokens", type=click.IntRange(1), default=8192, show_default=True, help="To choose λ on.")
@LENGTH
@SEED
@DEVICE
@plan_file("refitted.json")
def refit(model: str, sa: str, texts: tuple[str, ...], device: str, out: str, **settings: Any) -> None:
    """Fit the plan's matrices to what the plain model computes, layer by layer, and write plan and weights.

    The weights go beside the plan, to a file that ends in .delta.safetensors. A matrix is left alone where that is
    best on held-out text.
    """
    from minisa.checkpoint import as_stored
    from minisa.study.judge import Judge
    from minisa.study.plans import provenance, read_plan, save_plan
    from minisa.study.progress import Progress
    from minisa.study.refit import refit as refit_weights
    from minisa.study.text import sample

    llm = open_model(model, dtype="fp32", device=device, compile=False, max_seq_len=1)
    plan, weights = read_plan(model, sa)
    counts = [max(settings[name] // settings["length"], 1) for name in ("held_out_tokens", "tokens")]
    held_out, windows, _ = sample(llm, texts, settings["length"], counts, settings["seed"])
    judge = Judge(llm.model, held_out)
    bar = Progress("refit", plan.n_layers)
    found, corrections = refit_weights(llm.model, plan, windows, held_out, weights=weights, progress=bar.update)
    bar.close()
    before, after = judge.divergence(plan, weights), judge.divergence(plan, as_stored(found))
    figures = settings | {
        "tokens": windows.numel(),
        "held_out_tokens": held_out.numel(),
        "divergence": round(after, 5),
        "divergence_before": round(before, 5),
    }
    save_plan(plan, Path(out), provenance(model, texts, **figures), found)
    click.echo(f"{'matrix':<34}{'λ':>8}{'error before':>14}{'after':>9}")
    for fitted in corrections:  # errors on held-out text, as a share of the stream's square length
        ridge = f"{fitted.ridge:g}" if fitted.ridge < float("inf") else "left"
        click.echo(f"{fitted.name:<34}{ridge:>8}{fitted.before:>14.4%}{fitted.after:>9.4%}")
    click.echo(
        f"divergence after every second of {held_out.numel():,} held-out tokens: {before:.4f} nats a token before, "
        f"{after:.4f} after\n"
        f"{out}: {plan}, {len(found)} matrices of its own"
    )
