"""Benchmark tasks that lm-eval runs on local files: a YAML file in lm_tasks/ for each, and JSON lines in a folder.

The prompts and scores are those of lm-eval's own tasks of these names, so that figures can be compared.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jinja2 import TemplateError
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate

from minisa.errors import MinisaError
from minisa.study.compare import Pair
from minisa.study.lm import MinisaLM
from minisa.study.text import read_text

FOLDER = Path(__file__).parent / "lm_tasks"
EXAMPLES_SEED = 1234  # lm-eval's own, for every variant: all see the same examples


class Rows(list[dict[str, Any]]):
    """What lm-eval asks of a data set."""

    @property
    def features(self) -> dict[str, Any]:
        return self[0]


class LocalTask(ConfigurableTask):
    """A task of lm-eval's whose `dataset_kwargs` names the file of each split in a folder.

    metadata.examples_share: the field whose value a question and its examples have in common.
    Raises MinisaError for files that are missing or hold something else.
    """

    def __init__(self, config: dict[str, Any], data: Path) -> None:
        self._data = data
        self._fields = f"lm_tasks/{config['task']}.yaml says which fields its rows have"
        try:
            super().__init__(config=config)
        except (TemplateError, LookupError, TypeError, ValueError) as error:
            raise MinisaError(f"{data}: not the rows of {config['task']}: {error}: {self._fields}") from error
        self._examples = list(self.sampler.df)

    def download(self, dataset_kwargs: Mapping[str, str] | None = None, **_: Any) -> None:
        self.dataset = {split: read_rows(self._data / file) for split, file in (dataset_kwargs or {}).items()}

    def build_all_requests(self, **options: Any) -> None:
        name = self.config.task
        try:
            super().build_all_requests(**options)
        except (TemplateError, LookupError, TypeError, ValueError) as error:
            raise MinisaError(f"{self._data}: a row is not one of {name}: {error}: {self._fields}") from error
        except AssertionError as error:  # there are too few examples
            raise MinisaError(f"{self._data}, {name}: {error} Expected a smaller --num-fewshot") from error

    def fewshot_context(self, doc: dict[str, Any], *args: Any, **options: Any) -> Any:
        field = self.config.metadata.get("examples_share")
        if field is not None:
            self.sampler.replace_df([example for example in self._examples if example[field] == doc[field]])
        return super().fewshot_context(doc, *args, **options)


def task_names() -> list[str]:
    return sorted(file.stem for file in FOLDER.glob("*.yaml"))


def load_task(name: str, data: Path, num_fewshot: int | None = None) -> LocalTask:
    """A task over the files in a folder. num_fewshot: examples before each question, if not the task's own number."""
    if name not in task_names():
        raise MinisaError(f"--tasks: {name!r} is not one of {', '.join(task_names())}")
    config = yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    if num_fewshot is not None:
        config["num_fewshot"] = num_fewshot
    return LocalTask(config, data)


def read_rows(path: Path) -> Rows:
    """The rows of a file of one JSON object a line. Raises MinisaError for anything else."""
    try:
        rows = Rows(json.loads(line) for line in read_text(path).split("\n") if line.strip())
    except (ValueError, RecursionError) as error:
        raise MinisaError(f"{path}: not JSON ({error}): expected one object a line") from error
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise MinisaError(f"{path}: expected rows, one JSON object a line")
    return rows


def run_task(lm: MinisaLM, task: LocalTask, limit: int | None = None) -> dict[str, list[Pair]]:
    """For each metric its scores, one for each question, from lm-eval's records. limit: only the first questions."""
    scores: dict[str, list[Pair]] = {}
    for sample in samples_of(lm, task, limit):
        for metric in sample["metrics"]:
            name = metric if sample["filter"] == "none" else sample["filter"]
            scores.setdefault(name, []).append(_pair(metric, sample[metric]))
    return scores


def samples_of(lm: Any, task: LocalTask, limit: int | None = None) -> Sequence[dict[str, Any]]:
    """lm-eval's records, one for each question and filter of the answer; lm: any model of lm-eval's."""
    task.set_fewshot_seed(EXAMPLES_SEED)
    found = evaluate(lm=lm, task_dict={"tasks": {task.config.task: task}}, limit=limit, bootstrap_iters=0)
    return found["samples"][task.config.task]


def _pair(metric: str, value: Any) -> Pair:
    """A question's part in a metric that is a ratio of sums: F1 of label 1 is 2 TP / (2 TP + FP + FN)."""
    if metric == "f1":
        right, chosen = value
        return 2.0 * (chosen == right == 1), float((chosen == 1) + (right == 1))
    return (-value if metric == "perplexity" else float(value)), 1.0
