"""python -m minisa heal: the shared model learns to predict as the plain one does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from minisa.console import DEVICE, MODEL, Finite, open_model
from minisa.errors import MinisaError
from minisa.study.options import LENGTH, PLAN, SEED, TEXTS, plan_file


@click.command()
@MODEL
@PLAN
@TEXTS
@click.option("--minutes", type=Finite(0, min_open=True), help="Time to train.")
@click.option("--steps", type=click.IntRange(1), help="Steps to train, in place of --minutes: the same every time.")
@click.option(
    "--rate", type=Finite(0, 1, min_open=True), default=2e-4, show_default=True, help="Learning rate of Adam."
)
@LENGTH
@click.option(
    "--held-out-tokens", type=click.IntRange(1), default=4096, show_default=True, help="To choose the best weights on."
)
@SEED
@DEVICE
@plan_file("healed.json")
def heal(
    model: str,
    sa: str,
    texts: tuple[str, ...],
    minutes: float | None,
    steps: int | None,
    device: str,
    out: str,
    **settings: Any,
) -> None:
    """Distil the plain model into the shared one, and write the plan with its weights beside it.

    The weights go to a file that ends in .delta.safetensors: those that predicted best on held-out text. Broken off,
    the same command goes on where it was, from OUT.heal.
    """
    from minisa.study.heal import STATES, Training
    from minisa.study.heal import heal as distil
    from minisa.study.plans import provenance, read_plan, save_plan
    from minisa.study.resuming import fingerprint, read_state, write_state
    from minisa.study.text import sample, sha256_of

    if (minutes is None) == (steps is None):
        raise MinisaError("heal: say how long to train, by either --minutes or --steps")
    llm = open_model(model, dtype="fp32", device=device, compile=False, max_seq_len=1)
    plan, weights = read_plan(model, sa)
    settings["states"] = STATES
    state, kept = Path(f"{out}.heal"), dict(settings)
    kept["plan"] = f"{plan} {plan.head_maps} {plan.delta.sha256 if plan.delta else ''}"
    kept |= {"checkpoint": fingerprint(model), "texts": [sha256_of(text) for text in texts]}
    training = Training(**read_state(state, kept))
    if training.step:
        click.echo(f"going on from {state}: {training.step} steps, {training.seconds / 60:.1f} min", err=True)
    length = settings["length"]
    n_held_out = max(settings["held_out_tokens"] // length, 1)
    held_out, windows = sample(llm, texts, length, (n_held_out,), settings["seed"])
    if not len(windows):
        raise MinisaError(f"--text: {n_held_out} windows of {length} tokens are held out, none is left: give more text")
    limit = f"{minutes:g} min" if minutes is not None else f"{steps} steps"
    distil(
        llm.model,
        plan,
        windows,
        held_out,
        training,
        weights=weights,
        minutes=minutes,
        steps=steps,
        rate=settings["rate"],
        report=lambda line: click.echo(f"[{training.seconds / 60:5.1f} min of {limit}] {line}", err=True),
        saved=lambda: write_state(state, kept, vars(training)),
    )
    before = training.history[0][1]
    figures = settings | {
        "steps": training.step,
        "minutes": round(training.seconds / 60, 1),
        "held_out_tokens": held_out.numel(),
        "divergence": round(training.best, 5),
        "divergence_before": round(before, 5),
    }
    save_plan(plan, Path(out), provenance(model, texts, **figures), weights | training.best_weights)
    click.echo(
        f"divergence after every second of {held_out.numel():,} held-out tokens: {before:.4f} nats a token before, "
        f"{training.best:.4f} after {training.step} steps\n{out}: {plan}"
    )
