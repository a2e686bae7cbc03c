"""Benchmark tasks that lm-eval runs on local files: a YAML file in lm_tasks/ for each, and JSON lines in a folder.

Prompts and scores are those of lm-eval's own tasks, so that figures can be compared with published ones.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate

from minisa.errors import MinisaError
from minisa.study.compare import Pair
from minisa.study.text import read_text

FOLDER = Path(__file__).parent / "lm_tasks"
NAMES = sorted(file.stem for file in FOLDER.glob("*.yaml"))
EXAMPLES_SEED = 1234  # lm-eval's own; every variant sees the same examples


class Rows(list[dict[str, Any]]):
    """A split of a data set, as lm-eval takes it."""

    @property
    def features(self) -> dict[str, Any]:
        return self[0]


class LocalTask(ConfigurableTask):
    """A task over the files in a folder, of which `dataset_kwargs` names one for each split.

    num_fewshot: examples before each question, if not the task's own number. metadata.examples_share: the field that a
    question and its examples have in common. Raises MinisaError for files that are missing or hold something else.
    """

    def __init__(self, name: str, data: Path, num_fewshot: int | None = None) -> None:
        if name not in NAMES:
            raise MinisaError(f"--tasks: {name!r} is unknown: expected some of {', '.join(NAMES)}")
        config = yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
        if num_fewshot is not None:
            config["num_fewshot"] = num_fewshot
        self.data = data
        self.files = config["dataset_kwargs"]
        with self._checking(name):
            super().__init__(config=config)
        self._examples = self.fewshot_docs()

    def download(self, *_: Any, **__: Any) -> None:
        self.dataset = {split: read_rows(self.data / file) for split, file in self.files.items()}

    def build_all_requests(self, **options: Any) -> None:
        with self._checking(self.config.task):
            super().build_all_requests(**options)

    def construct_requests(self, doc: dict[str, Any], ctx: Any, **options: Any) -> Any:
        requests = super().construct_requests(doc, ctx, **options)
        if self.OUTPUT_TYPE == "multiple_choice":
            right = self.doc_to_text(doc) if self.multiple_input else self.doc_to_target(doc)
            if right not in range(len(requests)):
                raise ValueError(f"the right answer, {right!r}, is none of the choices")
        return requests

    def process_results(self, doc: dict[str, Any], results: Any) -> dict[str, Any]:
        with self._checking(self.config.task):
            return super().process_results(doc, results)

    def fewshot_context(self, doc: dict[str, Any], *args: Any, **options: Any) -> Any:
        if field := self.config.metadata.get("examples_share"):
            self.sampler.replace_df([example for example in self._examples if example[field] == doc[field]])
        return super().fewshot_context(doc, *args, **options)

    @contextmanager
    def _checking(self, name: str) -> Iterator[None]:
        try:
            yield
        except MinisaError:
            raise
        except Exception as error:  # of a template, of lm-eval, of Python: all that these read is the rows
            raise MinisaError(
                f"{self.data}: {name} cannot be made of {', '.join(self.files.values())}: {error}: "
                f"study/lm_tasks/{name}.yaml says which fields they have; for more examples a longer file is needed"
            ) from error


def read_rows(path: Path) -> Rows:
    """The rows of a file of one JSON object a line. Raises MinisaError for anything else."""
    try:
        rows = Rows(json.loads(line) for line in read_text(path).split("\n") if line.strip())
        json.dumps(rows, ensure_ascii=False).encode()  # fails for half a surrogate pair
    except (ValueError, RecursionError) as error:
        raise MinisaError(f"{path}: not JSON ({error}): expected one object a line") from error
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise MinisaError(f"{path}: expected rows, one JSON object a line")
    return rows


def samples_of(lm: Any, task: LocalTask, limit: int | None = None) -> Sequence[dict[str, Any]]:
    """lm-eval's records, one for each of the first `limit` questions and each of its filters; lm: any of its models."""
    task.set_fewshot_seed(EXAMPLES_SEED)
    found = evaluate(lm=lm, task_dict={"tasks": {task.task_name: task}}, limit=limit, bootstrap_iters=0)
    return found["samples"][task.task_name]


def scores_of(samples: Sequence[dict[str, Any]]) -> dict[str, list[Pair]]:
    """For each metric, or filter if there are several, the pairs of all questions."""
    scores: dict[str, list[Pair]] = {}
    for sample in samples:
        for metric in sample["metrics"]:
            name = metric if sample["filter"] == "none" else sample["filter"]
            scores.setdefault(name, []).append(_pair(metric, sample[metric]))
    return scores


def _pair(metric: str, value: Any) -> Pair:
    """A question's part in a metric that is a ratio of sums: F1 of label 1 is 2 TP / (2 TP + FP + FN)."""
    if metric == "f1":
        right, chosen = map(int, value)
        return 2.0 * (chosen == right == 1), float((chosen == 1) + (right == 1))
    return (-value if metric == "perplexity" else float(value)), 1.0
