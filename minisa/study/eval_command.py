"""python -m minisa eval: the plain model, plans and rivals on one task, item by item."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click

from minisa.benchmark.plot import check_matplotlib
from minisa.checkpoint import open_checkpoint
from minisa.console import KV_DTYPE, OutputFile, keep_apart, open_model, weights_options, write_json
from minisa.device import dtype_name
from minisa.engine import LLM
from minisa.errors import MinisaError
from minisa.models.registry import resolve
from minisa.study.evaluate import Evaluation, Perplexity, questions_for
from minisa.study.evaluation_report import plot, summarize, table
from minisa.study.progress import Progress
from minisa.study.results import Record, Results
from minisa.study.resuming import fingerprint
from minisa.study.tasks import TASKS, read_questions
from minisa.study.text import sha256_of
from minisa.study.variants import Models, Variant, parse_variants, plan_of

WINDOW = 512


@click.command("eval")
@weights_options
@click.option(
    "--sa", "plans", multiple=True, metavar="SPANS|PLAN.json|default", help="A plan to compare; may be given again."
)
@click.option(
    "--rival",
    "rivals",
    multiple=True,
    metavar="RIVAL",
    help="drop:7,9 (no attention there), cla:19:21 (layer 21 uses 19's keys and values), kv-int8, "
    "or one of these or sa:PLAN with +kv-int8; may be given again.",
)
@click.option("--task", required=True, type=click.Choice(["perplexity", *TASKS]))
@click.option("--data", required=True, metavar="FILE", help="A text for perplexity, else rows in JSON lines.")
@click.option("--shots", type=click.IntRange(0), help="Examples before a question; 5 for mmlu and gsm8k, else 0.")
@click.option("--shots-data", metavar="FILE", help="Where examples are taken from, the first ones.")
@click.option("--length", type=click.IntRange(2), help=f"Tokens of a window (perplexity only); {WINDOW} if not given.")
@click.option("--limit", type=click.IntRange(1), help="Only so many items (windows, for perplexity).")
@click.option(
    "--as-run",
    is_flag=True,
    help="Compute as chat.py would, the C++ step's rounding and --kv-dtype included (perplexity only, no rivals).",
)
@KV_DTYPE
@click.option(
    "--batch-tokens",
    type=click.IntRange(1),
    default=4096,
    show_default=True,
    help="Tokens in the model at once: bounds memory.",
)
@click.option(
    "--json",
    "json_file",
    type=OutputFile(),
    metavar="FILE.json",
    help="Write the summary there, and each item to FILE.items.jsonl as it is done: the same command goes on from it.",
)
@click.option(
    "--plot", "plot_file", type=OutputFile(), metavar="FILE.png", help="Draw the first metric against KV bytes saved."
)
def evaluate(
    model: str,
    plans: tuple[str, ...],
    rivals: tuple[str, ...],
    task: str,
    data: str,
    shots: int | None,
    shots_data: str | None,
    length: int | None,
    limit: int | None,
    as_run: bool,
    kv_dtype: str,
    batch_tokens: int,
    json_file: str | None,
    plot_file: str | None,
    **load: Any,
) -> None:
    """Compare plans of attention sharing, and what else saves KV bytes, with the plain model on one task.

    Every variant answers the same items; differences from plain are paired, with standard errors. PyTorch computes
    unless --as-run is given, so --quantize rounds the weights alone, and not what they are multiplied with, as the C++
    step does.
    """
    items_file = None if json_file is None else Path(json_file).with_suffix(".items.jsonl")
    written = {"--json": json_file, "the items of --json": items_file, "--plot": plot_file}
    used = [("--sa", sa) for sa in plans] + [("--rival", plan_of(rival)[0]) for rival in rivals]
    keep_apart(written, ("--model", model), ("--data", data), ("--shots-data", shots_data), *used)
    if plot_file is not None:
        check_matplotlib()
    if task == "perplexity" and (shots or shots_data):
        raise MinisaError("--shots, --shots-data: perplexity has no examples; leave them out")
    if task != "perplexity" and length is not None:
        raise MinisaError(f"--length: for perplexity only; {task} takes its items whole")
    if as_run and (task != "perplexity" or rivals):
        raise MinisaError("--as-run: for --task perplexity without rivals, whose layers PyTorch alone can run")
    if kv_dtype != "auto" and not as_run:
        raise MinisaError(f"--kv-dtype {kv_dtype}: goes with --as-run; without it the study's own caches are used")
    # Windows bring caches of their own; eager where rivals may change the layers and what they hold.
    models = Models(lambda sa: open_model(model, sa=sa, max_seq_len=1, compile=as_run, kv_dtype=kv_dtype, **load))
    plain = models.plain()
    path, entry = resolve(model)
    checkpoint = open_checkpoint(path)
    variants = parse_variants(plans, rivals, plain.config, entry)
    settings: Record = {
        "task": task,
        "model": entry.name if entry is not None else path.name,
        "checkpoint": fingerprint(model),
        "checkpoint_bytes": checkpoint.nbytes,
        "dtype": dtype_name(plain.dtype),
        "quantize": load["quantize"],
        "as_run": as_run,
        "kv_dtype": kv_dtype,
        "data_sha256": sha256_of(data),
    }
    evaluation: Evaluation
    if task == "perplexity":
        settings["length"] = length or WINDOW
        evaluation = Perplexity.of(plain, data, length or WINDOW, limit, batch_tokens, as_run)
    else:
        settings["shots"] = shots = TASKS[task].shots if shots is None else shots
        settings["shots_data_sha256"] = sha256_of(shots_data) if shots and shots_data else None
        questions = read_questions(TASKS[task], data, shots, shots_data, limit)
        evaluation = questions_for(plain, TASKS[task], questions, batch_tokens)
    if evaluation.cut:
        context = plain.config.max_seq_len
        click.echo(f"{evaluation.cut} items are cut at the beginning to fit the model's {context} tokens", err=True)
    del plain
    results = Results(items_file, settings, evaluation.metrics)
    try:
        records = answer_all(models, variants, evaluation, results)
    except KeyboardInterrupt:
        if json_file is not None:
            click.echo("interrupted: what is done is kept; the same command goes on from there", err=True)
        raise
    finally:
        results.close()
    config = checkpoint.config
    summary = summarize(settings, evaluation.metrics, config, variants, records) | {"cut": evaluation.cut}
    click.echo(f"{settings['model']} · {task} · {summary['items']} items · {settings['dtype']}")
    click.echo(table(summary))
    if json_file is not None:
        write_json(json_file, summary)
    if plot_file is not None:
        plot(summary, plot_file)


def answer_all(
    models: Models, variants: Sequence[Variant], evaluation: Evaluation, results: Results
) -> Mapping[str, Mapping[int, Record]]:
    """Every variant's records of the evaluation's items; those that results has already are not computed again."""
    for variant in variants:
        known = results.variant(variant.name, variant.identity)
        pending = [item for item in range(len(evaluation)) if item not in known]
        if pending:
            with models.opened(variant) as llm:
                _answer(llm, variant.name, pending, evaluation, partial(results.add, variant.name))
            del llm  # or it would stay until the next is loaded
    return {
        variant.name: {
            item: record
            for item, record in results.variant(variant.name, variant.identity).items()
            if item < len(evaluation)
        }
        for variant in variants
    }


def _answer(llm: LLM, name: str, pending: Sequence[int], evaluation: Evaluation, add: Any) -> None:
    progress = Progress(name, sum(map(evaluation.cost, pending)))
    done = 0
    try:
        for batch in evaluation.batches(pending):
            for item, record in zip(batch, evaluation.run(llm, batch), strict=True):
                add(item, record)
                done += evaluation.cost(item)
            progress.update(done)
    finally:
        progress.close()
