"""python -m minisa isotropy: which layers attend alike."""

from __future__ import annotations

from typing import Any

import click

from minisa.benchmark.plot import check_matplotlib
from minisa.console import OutputFile, keep_apart, open_model, weights_options, write_json
from minisa.device import dtype_name
from minisa.models.registry import resolve
from minisa.study.isotropy import similarity
from minisa.study.isotropy_report import as_record, plot, table
from minisa.study.options import LENGTH
from minisa.study.progress import Progress
from minisa.study.text import sha256_of, windows


@click.command()
@weights_options
@click.option("--text", required=True, metavar="FILE", help="UTF-8 text to look at.")
@LENGTH
@click.option("--limit", type=click.IntRange(1), default=8, show_default=True, help="Only so many windows.")
@click.option("--json", "json_file", type=OutputFile(), metavar="FILE.json", help="Write every matrix there.")
@click.option("--plot", "plot_file", type=OutputFile(), metavar="FILE.png", help="Draw the matrices.")
def isotropy(
    model: str, text: str, length: int, limit: int, json_file: str | None, plot_file: str | None, **load: Any
) -> None:
    """Measure how alike the attention of a model's layers is: for each layer, the earlier one most like it.

    pooled: cosine, heads averaged. same head, best head: cosine head by head. js: Jensen-Shannon divergence of each
    head from the one least unlike it, in bits. Each with the first token's column (the "sink") and without. It is a
    look at the model, not advice: layers that look alike are not always those that can share.
    """
    keep_apart({"--json": json_file, "--plot": plot_file}, ("--model", model), ("--text", text))
    if plot_file is not None:
        check_matplotlib()
    llm = open_model(model, max_seq_len=1, compile=False, **load)
    path, entry = resolve(model)
    cut = windows(llm, text, length, limit)
    progress = Progress("isotropy", len(cut))
    try:
        whole, rest = similarity(llm.model, cut, lambda done, total: progress.update(done))
    finally:
        progress.close()
    name = entry.name if entry is not None else path.name
    title = f"{name} · {len(cut)} windows of {length} tokens · {dtype_name(llm.dtype)}"
    click.echo(title)
    click.echo(table(whole, rest))
    if json_file is not None:
        settings = {
            "model": name,
            "dtype": dtype_name(llm.dtype),
            "quantize": load["quantize"],
            "text_sha256": sha256_of(text),
            "windows": len(cut),
            "length": length,
        }
        write_json(json_file, as_record(settings, whole, rest))
    if plot_file is not None:
        plot(title, whole, rest, plot_file)
