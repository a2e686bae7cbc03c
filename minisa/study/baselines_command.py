"""python -m minisa baselines: which layers a baseline would change."""

from __future__ import annotations

import math
from typing import Any

import click

from minisa.console import OutputFile, open_model, weights_options, write_json
from minisa.study.options import LENGTH


@click.command()
@weights_options
@click.argument("kind", type=click.Choice(["drop", "cla"]))
@click.argument("layers", type=click.IntRange(1))
@click.option("--text", required=True, metavar="FILE", help="UTF-8 text to choose by; not the one to be tested on.")
@LENGTH
@click.option("--limit", type=click.IntRange(1), default=4, show_default=True, help="At most so many windows.")
@click.option("--json", "json_file", type=OutputFile(), metavar="FILE.json", help="Write the choices there.")
def baselines(
    model: str, kind: str, layers: int, text: str, length: int, limit: int, json_file: str | None, **load: Any
) -> None:
    """Choose the LAYERS layers, 12 at most, that cost least with their attention dropped (drop), or with the keys and
    values of an earlier layer (cla).

    Greedily, by the loss on a text. Each line is a --baseline that eval takes, with what it saves and its perplexity.
    """
    from minisa.sharing import SharingPlan
    from minisa.study.baselines import slot_bytes
    from minisa.study.cheapest import cheapest
    from minisa.study.compare import exp
    from minisa.study.plans import text_settings
    from minisa.study.progress import Progress
    from minisa.study.text import windows

    llm = open_model(model, max_seq_len=1, compile=False, **load)
    cut = windows(llm, text, length, limit)
    bar = Progress(f"baselines {kind}", layers)
    none = SharingPlan.none(llm.config.n_layers)
    steps: list[dict[str, Any]] = []
    found = cheapest(llm.model, cut, kind, layers, progress=bar.update)
    _, plain = next(found)
    for baseline, loss in found:
        bar.close()
        saved = 1 - slot_bytes(llm.config, none, baseline) / slot_bytes(llm.config, none)
        ratio = exp(loss - plain)
        click.echo(f"{baseline}  KV saved {saved:.1%}  perplexity × {ratio:.3f}")
        steps.append({"baseline": str(baseline), "kv_saved": saved, "ratio": ratio if math.isfinite(ratio) else None})
    if len(steps) < layers:
        click.echo(f"baselines {kind}: {layers} layers were asked for, {len(steps)} can be chosen", err=True)
    if json_file is not None:
        write_json(json_file, {"settings": text_settings(llm, model, text, cut, load["quantize"]), "steps": steps})
