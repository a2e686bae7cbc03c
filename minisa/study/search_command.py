"""python -m minisa search: a plan for a model, by measured divergence on held-out text."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import click

from minisa.benchmark.plot import check_matplotlib, save
from minisa.config import ModelConfig
from minisa.console import DEVICE, MODEL, Finite, OutputFile, keep_apart, open_model
from minisa.errors import MinisaError
from minisa.sharing import SharingPlan
from minisa.study.findings import Point, read_findings, write_findings
from minisa.study.loss import perplexity, token_losses
from minisa.study.options import FILE, LENGTH, SEED, TEXTS, plan_file
from minisa.study.plans import kv_saved, provenance, save_plan, weights_saved
from minisa.study.resuming import fingerprint
from minisa.study.search import Search
from minisa.study.text import echoing, sample, sha256_of
from minisa.study.walk import share


@click.command()
@MODEL
@click.option("--followers", type=click.IntRange(1), help="Layers that shall follow.")
@click.option("--spans", help="Followers and leaders as 3:6,19:21, in place of a search: head maps alone are made.")
@TEXTS
@click.option("--validation", type=FILE, help="Text to measure plans on; else windows of --text held out for that.")
@click.option("--budget-minutes", type=Finite(0), default=30.0, show_default=True, help="Time to search.")
@click.option(
    "--calibration-tokens", type=click.IntRange(1), default=4096, show_default=True, help="To choose head maps on."
)
@click.option("--held-out-tokens", type=click.IntRange(1), default=4096, show_default=True, help="To measure plans on.")
@LENGTH
@SEED
@DEVICE
@plan_file("plan.json")
@click.option("--plot", type=OutputFile(), help="Draw divergence against bytes saved to this PNG (extra `plots`).")
def search(
    model: str,
    followers: int | None,
    spans: str | None,
    texts: tuple[str, ...],
    validation: str | None,
    budget_minutes: float,
    calibration_tokens: int,
    held_out_tokens: int,
    length: int,
    seed: int,
    device: str,
    out: str,
    plot: str | None,
) -> None:
    """Choose followers, leaders and head maps by what they cost on held-out text, and write the plan.

    Every second window of that text says its first half twice, so that copying from the context counts.

    Broken off, the same command goes on where it was: what has been measured is kept in OUT.search.
    """
    if (followers is None) == (spans is None):
        raise MinisaError("search: say how many layers shall follow, by --followers, or which, by --spans")
    read = [("--model", model), ("--validation", validation), *(("--text", text) for text in texts)]
    keep_apart({"--out": out, "--plot": plot}, *read)
    began = time.monotonic()
    if plot is not None:
        check_matplotlib()
    llm = open_model(model, dtype="fp32", device=device, compile=False, max_seq_len=1)
    state = Path(f"{out}.search")
    settings = {
        "model": Path(model).name,
        "checkpoint": fingerprint(model),
        "texts": [sha256_of(text) for text in texts],
        "validation": sha256_of(validation) if validation else None,
        "calibration_tokens": calibration_tokens,
        "held_out_tokens": held_out_tokens,
        "length": length,
        "seed": seed,
    }
    findings = read_findings(state, settings, llm.config)
    if findings.measured:
        click.echo(f"going on from {state}: {len(findings.measured)} plans measured", err=True)
    n_calibration, n_held_out = (max(tokens // length, 1) for tokens in (calibration_tokens, held_out_tokens))
    if validation is None:
        held_out, calibration, _ = sample(llm, texts, length, (n_held_out, n_calibration), seed)
    else:
        calibration, _ = sample(llm, texts, length, (n_calibration,), seed)
        held_out, _ = sample(llm, [validation], length, (n_held_out,), seed)
    held_out = echoing(held_out, len(llm.tokenizer.bos_ids))

    def report(line: str) -> None:
        minutes = (time.monotonic() - began) / 60
        click.echo(f"[{minutes:5.1f} of {budget_minutes:g} min] {line}", err=True)

    def saved() -> None:
        write_findings(state, settings, findings)

    searching = Search(
        llm.model,
        calibration,
        held_out,
        findings,
        deadline=began + 60 * budget_minutes,
        report=report,
        saved=saved,
    )
    if followers is not None:
        points = searching.run(followers)
    else:
        points = [searching.mapped(SharingPlan.parse(spans or "", llm.config.n_layers))]
    best = points[-1]
    report("the loss on the held-out text")
    plain = token_losses(llm.model, held_out)
    shared = token_losses(share(llm.model, best.plan), held_out)
    ratio = perplexity(shared) / perplexity(plain)
    figures = {
        "length": length,
        "seed": seed,
        "calibration_tokens": calibration.numel(),
        "held_out_tokens": held_out.numel(),
        "divergence": round(best.divergence, 5),
        "perplexity_ratio": round(ratio, 4),
        "kv_saved": round(kv_saved(llm.config, best.plan), 4),
    }
    files = [*texts, validation] if validation else texts
    save_plan(best.plan, Path(out), provenance(model, files, **figures), None)
    click.echo(pareto(points, llm.config))
    click.echo(
        f"perplexity on {held_out.numel():,} held-out tokens: plain {perplexity(plain):.3f}, "
        f"shared {perplexity(shared):.3f} ({ratio - 1:+.1%})\n{out}: {best.plan}"
    )
    if plot is not None:
        draw(points, llm.config, plot)


def pareto(points: Sequence[Point], config: ModelConfig) -> str:
    """The table of quality against bytes saved."""
    rows = ["followers  KV saved  weights saved  nats a token  plan"]
    for point in points:
        rows.append(
            f"{len(point.plan.followers):>9}  {kv_saved(config, point.plan):>8.1%}  "
            f"{weights_saved(config, point.plan):>13.1%}  {point.divergence:>12.4f}  {point.plan}"
        )
    return "\n".join(rows)


def draw(points: Sequence[Point], config: ModelConfig, path: str) -> None:
    """Divergence against the share of the KV cache saved, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot([100 * kv_saved(config, p.plan) for p in points], [p.divergence for p in points], marker="o")
    for point in points:
        place = (100 * kv_saved(config, point.plan), point.divergence)
        axes.annotate(str(len(point.plan.followers)), place, xytext=(4, -10), textcoords="offset points")
    axes.set_xlabel("KV cache saved, %")
    axes.set_ylabel("divergence from plain, nats a token")
    axes.set_title("followers, by search")
    axes.set_ylim(bottom=0)
    save(figure, path, dpi=120)
