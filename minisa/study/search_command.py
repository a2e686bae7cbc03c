"""python -m minisa search: a plan for a model, by measured divergence on held-out text."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from minisa.console import DEVICE, MODEL, Finite, open_model
from minisa.errors import MinisaError
from minisa.study.options import LENGTH, SEED, TEXTS, plan_file


@click.command()
@MODEL
@click.option("--followers", type=click.IntRange(1), help="How many layers shall follow.")
@click.option("--spans", help="Followers and leaders as 3:6,19:21, in place of a search: only head maps are made.")
@TEXTS
@click.option("--budget-minutes", type=Finite(0), default=30.0, show_default=True, help="Time to search.")
@click.option(
    "--calibration-tokens", type=click.IntRange(1), default=4096, show_default=True, help="To choose head maps on."
)
@click.option("--held-out-tokens", type=click.IntRange(1), default=4096, show_default=True, help="To measure plans on.")
@LENGTH
@SEED
@DEVICE
@plan_file("plan.json")
def search(
    model: str,
    followers: int | None,
    spans: str | None,
    texts: tuple[str, ...],
    budget_minutes: float,
    device: str,
    out: str,
    **settings: Any,
) -> None:
    """Choose followers, leaders and head maps by what they cost on held-out text, and write the plan.

    Every second window of that text says its first half twice, so that copying from the context counts.

    Broken off, the same command goes on where it was, from OUT.search.
    """
    from minisa.sharing import SharingPlan
    from minisa.study.loss import perplexity, token_losses
    from minisa.study.plans import kv_saved, provenance, save_plan
    from minisa.study.resuming import fingerprint, read_state, write_state
    from minisa.study.search import Findings, Search
    from minisa.study.text import echoing, sample, sha256_of
    from minisa.study.walk import share

    if (followers is None) == (spans is None):
        raise MinisaError("search: say how many layers shall follow, by --followers, or which, by --spans")
    began = time.monotonic()
    llm = open_model(model, dtype="fp32", device=device, compile=False, max_seq_len=1)
    state = Path(f"{out}.search")
    kept = settings | {"checkpoint": fingerprint(model), "texts": [sha256_of(text) for text in texts]}
    findings = Findings(**read_state(state, kept))
    if findings.measured:
        click.echo(f"going on from {state}: {len(findings.measured)} plans measured", err=True)
    length = settings["length"]
    counts = [max(settings[name] // length, 1) for name in ("held_out_tokens", "calibration_tokens")]
    held_out, calibration, _ = sample(llm, texts, length, counts, settings["seed"])
    held_out = echoing(held_out, len(llm.tokenizer.bos_ids))

    def report(line: str) -> None:
        minutes = (time.monotonic() - began) / 60
        click.echo(f"[{minutes:5.1f} of {budget_minutes:g} min] {line}", err=True)

    def saved() -> None:
        write_state(state, kept, vars(findings))

    searching = Search(llm.model, calibration, held_out, findings, began + 60 * budget_minutes, report, saved)
    if spans is None:
        points = searching.run(followers or 0)
    else:
        points = [searching.mapped(SharingPlan.parse(spans, llm.config.n_layers))]
    best = points[-1]
    plain = token_losses(llm.model, held_out)
    shared = token_losses(share(llm.model, best.plan), held_out)
    ratio = perplexity(shared) / perplexity(plain)
    figures = settings | {
        "calibration_tokens": calibration.numel(),
        "held_out_tokens": held_out.numel(),
        "divergence": round(best.divergence, 5),
        "perplexity_ratio": round(ratio, 4),
        "kv_saved": round(kv_saved(llm.config, best.plan), 4),
    }
    save_plan(best.plan, Path(out), provenance(model, texts, **figures), {})
    click.echo("followers  KV saved  nats a token  plan")
    for point in points:
        share_saved = kv_saved(llm.config, point.plan)
        click.echo(f"{len(point.plan.followers):>9}  {share_saved:>8.1%}  {point.divergence:>12.4f}  {point.plan}")
    click.echo(
        f"perplexity on {held_out.numel():,} held-out tokens: plain {perplexity(plain):.3f}, "
        f"shared {perplexity(shared):.3f} ({ratio - 1:+.1%})\n{out}: {best.plan}"
    )
