"""python -m minisa eval: the plain model, plans and rivals on the same items."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import click

from minisa.console import KV_DTYPE, OutputFile, open_model, weights_options, write_json
from minisa.errors import MinisaError

ANSWERS = 8  # generated together


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
@click.option(
    "--perplexity", "text", type=click.Path(dir_okay=False), metavar="FILE", help="Perplexity on a UTF-8 text."
)
@click.option("--length", type=click.IntRange(2), default=512, show_default=True, help="Tokens of a window of text.")
@click.option(
    "--tasks",
    metavar="TASK,TASK",
    help="arc_easy, gsm8k, hellaswag, lambada, mmlu, mrpc, piqa, rte, sst2, winogrande: by lm-eval, on files in --data.",
)
@click.option("--data", type=click.Path(file_okay=False), metavar="FOLDER", help="Of hellaswag.jsonl and so on.")
@click.option("--num-fewshot", type=click.IntRange(0), help="Examples before a question; 5 for mmlu and gsm8k, else 0.")
@click.option("--limit", type=click.IntRange(1), help="Only so many windows, and so many items of each task.")
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
@click.option("--json", "json_file", type=OutputFile(), metavar="FILE.json", help="Write the results there.")
@click.option("--plot", "plot_file", type=OutputFile(), metavar="FILE.png", help="Draw them against KV bytes saved.")
def evaluate(
    model: str,
    plans: tuple[str, ...],
    rivals: tuple[str, ...],
    text: str | None,
    length: int,
    tasks: str | None,
    data: str | None,
    num_fewshot: int | None,
    limit: int | None,
    as_run: bool,
    kv_dtype: str,
    batch_tokens: int,
    json_file: str | None,
    plot_file: str | None,
    **load: Any,
) -> None:
    """Compare plans of attention sharing, and what else saves KV bytes, with the plain model.

    Every variant sees the same items; differences from plain are paired, with standard errors. PyTorch computes unless
    --as-run is given, so --quantize rounds the weights alone, and not what they are multiplied with, as the C++ step
    does.
    """
    from minisa.benchmark.plot import check_matplotlib
    from minisa.device import dtype_name
    from minisa.models.registry import resolve
    from minisa.study.evaluate import perplexity_scores
    from minisa.study.results import plot, summarize, table
    from minisa.study.text import sha256_of, windows
    from minisa.study.variants import Models, parse_variants

    if text is None and tasks is None:
        raise MinisaError("eval: give --perplexity FILE, or --tasks with --data FOLDER")
    if (tasks is None) != (data is None):
        raise MinisaError("eval: --tasks and --data go together")
    if as_run and (tasks or rivals):
        raise MinisaError("--as-run: for --perplexity without rivals, whose layers PyTorch alone can run")
    if kv_dtype != "auto" and not as_run:
        raise MinisaError(f"--kv-dtype {kv_dtype}: goes with --as-run; without it the study's own caches are used")
    if plot_file is not None:
        check_matplotlib()
    settings = {"model": model, "quantize": load["quantize"], "as_run": as_run, "kv_dtype": kv_dtype, "limit": limit}
    suite = []
    if tasks is not None and data is not None:
        _prepare_lm_eval()
        from minisa.study.lm import MinisaLM
        from minisa.study.tasks import load_task, run_task

        suite = [load_task(name.strip(), Path(data), num_fewshot) for name in tasks.split(",")]
        files = sorted({file for task in suite for file in task.config.dataset_kwargs.values()})
        settings |= {"num_fewshot": num_fewshot, "data_sha256": {file: sha256_of(Path(data, file)) for file in files}}
    generates = any(task.OUTPUT_TYPE == "generate_until" for task in suite)
    cache = {"max_batch": ANSWERS} if generates else {"max_seq_len": 1}  # scores are computed in caches of their own

    # Eager, as rivals change the layers.
    models = Models(lambda sa: open_model(model, sa=sa, compile=as_run, kv_dtype=kv_dtype, **cache, **load))
    plain = models.plain()
    config = plain.config
    path, entry = resolve(model)
    settings |= {"model": entry.name if entry is not None else path.name, "dtype": dtype_name(plain.dtype)}
    variants = parse_variants(plans, rivals, config, entry)
    if text is not None:
        cut = windows(plain, text, length, limit)
        settings |= {"length": length, "text_sha256": sha256_of(text)}
    del plain
    scores = []
    for variant in variants:
        found = {}
        with models.opened(variant) as llm:
            if text is not None:
                found["perplexity"] = perplexity_scores(llm, cut, batch_tokens, as_run, f"{variant.name}, perplexity")
            for task in suite:
                lm = MinisaLM(llm, batch_tokens, f"{variant.name}, {task.config.task}")
                found[task.config.task] = run_task(lm, task, limit)
                if lm.truncated and not scores:
                    click.echo(f"{task.config.task}: {lm.truncated} texts are cut to fit the model's context", err=True)
                del lm
        del llm  # or its memory would stay until the next is loaded
        scores.append(found)
    summary = summarize(settings, config, variants, scores)
    for name, found in summary["variants"][0]["benchmarks"].items():
        click.echo(f"{settings['model']} · {name} · {found['items']} items · {settings['dtype']}")
        click.echo(table(summary, name))
    if json_file is not None:
        write_json(json_file, summary)
    if plot_file is not None:
        plot(summary, plot_file)


def _prepare_lm_eval() -> None:
    """Before lm-eval is imported: no progress bars but ours, and no network."""
    if importlib.util.find_spec("lm_eval") is None:
        raise MinisaError('--tasks: needs lm-eval; pip install "minisa[eval]"')
    for name in ("TQDM_DISABLE", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        os.environ[name] = "1"
