"""python -m minisa eval: the plain model, plans and baselines on the same items."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from minisa.console import KV_DTYPE, OutputFile, fetch_default, open_model, weights_options, write_json
from minisa.errors import MinisaError

if TYPE_CHECKING:
    from minisa.engine import LLM

ANSWERS = 8  # generated together


@click.command("eval")
@weights_options
@click.option("--sa", "plans", multiple=True, metavar="SPANS|PLAN.json|default", help="A plan; may be given again.")
@click.option(
    "--baseline",
    "baselines",
    multiple=True,
    metavar="BASELINE",
    help="drop:7,9 (no attention there), cla:19:21 (layer 21 uses 19's keys and values), kv-int8, "
    "or one of these or sa:PLAN with +kv-int8; may be given again.",
)
@click.option("--perplexity", "text", metavar="FILE", help="Perplexity on a UTF-8 text.")
@click.option("--length", type=click.IntRange(2), default=512, show_default=True, help="Tokens of a window of text.")
@click.option(
    "--tasks",
    metavar="TASK,TASK",
    help="By lm-eval: arc_easy, gsm8k, hellaswag, lambada, mmlu, mrpc, piqa, rte, sst2, winogrande.",
)
@click.option("--data", metavar="FOLDER", help="Where the tasks' files are, hellaswag.jsonl and so on.")
@click.option("--num-fewshot", type=click.IntRange(0), help="Examples before a question; 5 for mmlu and gsm8k, else 0.")
@click.option("--limit", type=click.IntRange(1), help="Only so many windows, and so many items of each task.")
@click.option(
    "--as-run",
    is_flag=True,
    help="Compute as chat.py would, with the C++ step and --kv-dtype: for --perplexity and gsm8k, without baselines.",
)
@KV_DTYPE
@click.option("--json", "json_file", type=OutputFile(), metavar="FILE.json", help="Write the results there.")
@click.option("--plot", "plot_file", type=OutputFile(), metavar="FILE.png", help="Draw them against KV bytes saved.")
def evaluate(
    model: str,
    plans: tuple[str, ...],
    baselines: tuple[str, ...],
    text: str | None,
    length: int,
    tasks: str | None,
    data: str | None,
    num_fewshot: int | None,
    limit: int | None,
    as_run: bool,
    kv_dtype: str,
    json_file: str | None,
    plot_file: str | None,
    **load: Any,
) -> None:
    """Compare plans of attention sharing, and what else saves KV bytes, with the plain model.

    Every variant sees the same items; differences from plain are paired, with standard errors. PyTorch computes unless
    --as-run is given, so --quantize rounds the weights alone, and not what they are multiplied with, as the C++ step
    does.
    """
    for name in ("TQDM_DISABLE", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):  # lm-eval's bars and downloads
        os.environ[name] = "1"
    from minisa.benchmark.plot import check_matplotlib
    from minisa.checkpoint import open_checkpoint
    from minisa.device import dtype_name
    from minisa.models.registry import resolve
    from minisa.study.loss import window_scores
    from minisa.study.results import Record, Scores, plot, summarize, table
    from minisa.study.text import sha256_of, windows
    from minisa.study.variants import PLAIN, opened, parse_variants

    if (text is None and tasks is None) or (tasks is None) != (data is None):
        raise MinisaError("eval: give --perplexity FILE, or --tasks with --data FOLDER, or both")
    if kv_dtype != "auto" and not as_run:
        raise MinisaError(f"--kv-dtype {kv_dtype}: goes with --as-run; without it the study's own caches are used")
    if plot_file is not None:
        check_matplotlib()
    settings: Record = {"quantize": load["quantize"], "as_run": as_run, "kv_dtype": kv_dtype}
    if text is not None:
        settings |= {"length": length, "text_sha256": sha256_of(text)}
    suite = []
    if tasks is not None and data is not None:
        if importlib.util.find_spec("lm_eval") is None:
            raise MinisaError('--tasks: needs lm-eval; pip install "minisa[eval]"')
        from minisa.study.lm import MinisaLM
        from minisa.study.tasks import LocalTask, samples_of, scores_of

        suite = [LocalTask(name.strip(), Path(data), num_fewshot) for name in tasks.split(",")]
        files = {file: sha256_of(Path(data, file)) for task in suite for file in task.files.values()}
        settings |= {"num_fewshot": num_fewshot, "data_sha256": files}
    generate = [task.OUTPUT_TYPE == "generate_until" for task in suite]
    if as_run and (baselines or not all(generate)):
        raise MinisaError("--as-run: for --perplexity and gsm8k without baselines; PyTorch computes all others")
    cache = (
        {"max_batch": ANSWERS} if any(generate) else {"max_seq_len": 1}
    )  # scores are computed in caches of their own

    def open_with(sa: str | None) -> LLM:  # eager, as baselines change the layers
        return open_model(model, sa=sa, compile=as_run, kv_dtype=kv_dtype, **cache, **load)

    fetch_default(model)
    path, entry = resolve(model)
    config = open_checkpoint(path).config
    variants = parse_variants(plans, baselines, config, entry)
    settings["model"] = entry.name if entry is not None else path.name
    scores: dict[str, Scores] = {}
    for variant, llm in opened(variants, open_with):
        found = scores[variant.name] = {}
        if text is not None:
            cut = windows(llm, text, length, limit)
            found["perplexity"] = {"perplexity": window_scores(llm, cut, as_run, f"{variant.name}, perplexity")}
        for task in suite:
            lm = MinisaLM(llm, f"{variant.name}, {task.task_name}")
            found[task.task_name] = scores_of(samples_of(lm, task, limit))
            if lm.truncated and variant.name == PLAIN:
                click.echo(f"{task.task_name}: {lm.truncated} texts are cut to fit the model's context", err=True)
            del lm
        settings["dtype"] = dtype_name(llm.dtype)
        del llm  # or its memory would stay until the next is loaded
    summary = summarize(settings, config, variants, scores)
    for name, items in summary["items"].items():
        click.echo(f"{settings['model']} · {name} · {items} items · {settings['dtype']}\n{table(summary, name)}")
    if json_file is not None:
        write_json(json_file, summary)
    if plot_file is not None:
        plot(summary, plot_file)
