"""The tasks of eval: prompts and scores are lm-eval's own, and files that hold something else are refused."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from minisa.errors import MinisaError
from minisa.study.compare import ratio
from tests.study_rows import LM_TASKS, ROWS, write_data

pytest.importorskip("lm_eval", reason='needs pip install "minisa[eval]"')
import datasets
import lm_eval
from lm_eval.api.model import LM
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager

from minisa.study.tasks import NAMES, LocalTask, samples_of, scores_of

THEIRS = {"arc_easy": "arc", "mmlu": "mmlu", "sst2": "glue", "mrpc": "glue", "rte": "glue"}  # folders, if not the name
NAMED = {"mmlu": "mmlu_anatomy", "lambada": "lambada_openai"}


class Guessing(LM):
    """Scores and answers that depend on the request alone."""

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        draws = [random.Random(repr(request.args)) for request in requests]
        return [(-10 * draw.random(), draw.random() < 0.5) for draw in draws]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        raise NotImplementedError

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        answers = [" 4\n#### 1004", "#### $1,004.", "It is 1004.", "I don't know...", "1004 or 5", "#### -1004"]
        return [answers[number % len(answers)] for number, _ in enumerate(requests)]


def variations(name: str) -> list[dict[str, Any]]:
    """Rows that differ in what is asked and in what is right."""
    rows = []
    for number in range(12):
        row = dict(ROWS[name])
        key = next(key for key in ("ctx_a", "question", "goal", "sentence1", "sentence", "context") if key in row)
        row[key] = f"Number {number}. {row[key]}"
        row |= {key: type(row[key])(number % 2) for key in ("label",) if key in row}
        rows.append(row)
    return rows


@pytest.mark.parametrize(("name", "num_fewshot"), [*((name, None) for name in NAMES), ("mmlu", 2), ("gsm8k", 2)])
def test_prompts_and_scores_are_lm_eval_s(
    name: str, num_fewshot: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = variations(name)
    pool = rows if name != "mmlu" else [row for other in rows for row in (other | {"subject": "law"}, other)]
    mine = LocalTask(name, write_data(tmp_path, name, *pool), num_fewshot)
    found = samples_of(Guessing(), mine)

    if name == "lambada":
        rows = [{"text": f"{row['context']} {row['continuation']}"} for row in rows]
    split = datasets.Dataset.from_list(rows)
    offline = dict.fromkeys(("train", "validation", "test", "dev"), split)
    monkeypatch.setattr(ConfigurableTask, "download", lambda self, *_, **__: setattr(self, "dataset", offline))
    folder = Path(lm_eval.__file__).parent / "tasks" / THEIRS.get(name, name)
    theirs = TaskManager(include_path=folder, include_defaults=False).load([NAMED.get(name, name)])
    ((_, task),) = theirs["tasks"].items()
    task.set_config("num_fewshot", mine.config.num_fewshot or 0)
    task.set_fewshot_seed(1234)
    results = evaluate(lm=Guessing(), task_dict=theirs, bootstrap_iters=0)
    ((_, expected),) = results["samples"].items()

    if name == "mmlu":  # ours has another subject's questions between
        found = [sample for sample in found if sample["doc"]["subject"] == "anatomy"]
    assert [sample["arguments"] for sample in found] == [sample["arguments"] for sample in expected]
    ((_, metrics),) = results["results"].items()
    for metric, pairs in scores_of(expected).items():
        value = math.exp(ratio(pairs).value) if metric == "perplexity" else ratio(pairs).value
        key = f"exact_match,{metric}" if name == "gsm8k" else f"{metric},none"
        assert value == pytest.approx(metrics[key]), metric


def test_every_variant_sees_the_same_examples(tmp_path: Path) -> None:
    task = LocalTask("piqa", write_data(tmp_path, "piqa", *variations("piqa")), num_fewshot=3)
    first, second = (samples_of(Guessing(), task, limit=5) for _ in range(2))
    assert len(first) == 5
    assert first == second
    for sample in first:
        examples, asked = sample["arguments"][0][0].rsplit("Question: ", 1)
        assert asked not in examples


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        ("piqa", {"goal": "x"}, "piqa cannot be made of piqa.jsonl: 'label' is undefined: study/lm_tasks/piqa.yaml"),
        ("winogrande", ROWS["winogrande"] | {"sentence": "no blank"}, "winogrande cannot be made of"),
        ("arc_easy", ROWS["arc_easy"] | {"answerKey": "E"}, "arc_easy cannot be made of"),
        ("mmlu", ROWS["mmlu"] | {"choices": ["1", "2"]}, "mmlu cannot be made of"),
        ("mmlu", ROWS["mmlu"], "mmlu cannot be made of .*the 1 that are available"),
        ("hellaswag", ROWS["hellaswag"] | {"endings": 5}, "hellaswag cannot be made of"),
        ("hellaswag", ROWS["hellaswag"] | {"label": ""}, "the right answer, '', is none of the choices"),
        ("piqa", ROWS["piqa"] | {"sol1": ["x"]}, "piqa cannot be made of"),
        ("piqa", ROWS["piqa"] | {"goal": "\ud800"}, "piqa.jsonl: not JSON .*surrogates not allowed"),
        ("piqa", [1], "piqa.jsonl: expected rows, one JSON object a line"),
        ("chess", {}, "'chess' is unknown: expected some of arc_easy, gsm8k"),
    ],
)
def test_rows_of_something_else(task: str, row: Any, message: str, tmp_path: Path) -> None:
    if task in NAMES:
        write_data(tmp_path, task, row)
    with pytest.raises(MinisaError, match=message):
        samples_of(Guessing(), LocalTask(task, tmp_path))


@pytest.mark.parametrize(
    ("content", "message"), [("{not json\n", "not JSON"), ("\n", "expected rows"), (None, "cannot read the text")]
)
def test_files_that_hold_no_rows(content: str | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "piqa.jsonl").write_text(content)
    with pytest.raises(MinisaError, match=message):
        LocalTask("piqa", tmp_path)


def test_every_task_has_a_row_here() -> None:
    assert set(NAMES) == set(ROWS) == {file.stem for file in LM_TASKS.iterdir()}
