"""python -m minisa rivals: which layers a rival of attention sharing would change."""

from __future__ import annotations

import math
from typing import Any

import click

from minisa.console import OutputFile, keep_apart, open_model, weights_options, write_json
from minisa.device import dtype_name
from minisa.models.registry import resolve
from minisa.study.cheapest import KEPT, cheapest
from minisa.study.compare import exp
from minisa.study.options import LENGTH
from minisa.study.progress import Progress
from minisa.study.text import sha256_of, windows
from minisa.study.variants import parse_variants


@click.command()
@weights_options
@click.argument("kind", type=click.Choice(["drop", "cla"]))
@click.argument("layers", type=click.IntRange(1, KEPT))
@click.option("--text", required=True, metavar="FILE", help="UTF-8 text to choose by; not the one to be tested on.")
@LENGTH
@click.option("--limit", type=click.IntRange(1), default=4, show_default=True, help="Only so many windows.")
@click.option("--json", "json_file", type=OutputFile(), metavar="FILE.json", help="Write the choices there.")
def rivals(
    model: str, kind: str, layers: int, text: str, length: int, limit: int, json_file: str | None, **load: Any
) -> None:
    """Choose the LAYERS layers, 12 at most, that cost least without their attention (drop), or with another's keys and
    values (cla).

    Greedily, by the loss on a text. Each line is a --rival that eval takes, with what it saves and its perplexity.
    """
    keep_apart({"--json": json_file}, ("--model", model), ("--text", text))
    llm = open_model(model, max_seq_len=1, compile=False, **load)
    cut = windows(llm, text, length, limit)
    bar: list[Progress] = []

    def show(done: int, total: int) -> None:
        bar[:] = bar or [Progress(f"rivals {kind}", total)]
        bar[0].update(done, total)

    steps = []
    plain = None
    try:
        for step in cheapest(llm.model, cut, kind, layers, progress=show):
            if plain is None:
                plain = step.loss
                continue
            rival = str(step.rival)
            (_, variant) = parse_variants([], [rival], llm.config, None)
            ratio = exp(step.loss - plain)
            if bar:
                bar[0].close()
            click.echo(f"{rival}  KV saved {variant.saved(llm.config):.1%}  perplexity × {ratio:.3f}")
            steps.append(
                {
                    "rival": rival,
                    "kv_saved": variant.saved(llm.config),
                    "ratio": ratio if math.isfinite(ratio) else None,
                }
            )
    finally:
        if bar:
            bar[0].close()
    if len(steps) < layers:
        click.echo(f"rivals {kind}: {layers} layers were asked for, no more than {len(steps)} can be chosen", err=True)
    if json_file is not None:
        path, entry = resolve(model)
        settings = {
            "model": entry.name if entry is not None else path.name,
            "dtype": dtype_name(llm.dtype),
            "quantize": load["quantize"],
            "text_sha256": sha256_of(text),
            "windows": len(cut),
            "length": length,
        }
        write_json(json_file, {"settings": settings, "steps": steps})
