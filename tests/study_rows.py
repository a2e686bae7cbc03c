"""A row of each of eval's tasks, as its makers wrote it, and words to fill others with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import yaml

from minisa.study import text

WORDS = ["the", "cat", "sat", "on", "a", "mat", "while", "rain", "fell", "over", "quiet", "red", "roof", "in", "town"]
LM_TASKS = Path(text.__file__).parent / "lm_tasks"
ROWS: dict[str, dict[str, Any]] = {
    "hellaswag": {
        "activity_label": "Baking",
        "ctx_a": "[header] How to bake [title] Mix flour. [step] Stir.",
        "ctx_b": "then HE",
        "endings": ["stirs.", "[title] Bake it. [step] Eat  up.", "sleeps."],
        "label": "1",
    },
    "arc_easy": {
        "question": "What is hot?",
        "choices": {"text": ["ice", "fire"], "label": ["A", "B"]},
        "answerKey": "B",
    },
    "piqa": {"goal": "Boil an egg.", "sol1": "Use water.", "sol2": "Use sand, a lot of sand.", "label": 0},
    "mmlu": {"question": " One plus one? ", "subject": "anatomy", "choices": ["1", "2", "3", "4"], "answer": 1},
    "sst2": {"sentence": "a fine film ", "label": 1},
    "mrpc": {"sentence1": "He ran .", "sentence2": "He was running .", "label": 1},
    "rte": {"sentence1": "It rains.", "sentence2": "It is dry.", "label": 1},
    "winogrande": {
        "sentence": "The cup missed the bag as the _ was small.",
        "option1": "cup",
        "option2": "bag",
        "answer": "2",
    },
    "lambada": {"context": "He met Ann and said: hello,", "continuation": "Ann"},
    "gsm8k": {"question": "Two and two?", "answer": "2 + 2 = <<2+2=4>>4\n#### 1,004"},
}


def write_data(folder: Path, task: str, *rows: Any) -> Path:
    """A folder with the rows in each of a task's files."""
    folder.mkdir(exist_ok=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    for file in yaml.safe_load((LM_TASKS / f"{task}.yaml").read_text())["dataset_kwargs"].values():
        (folder / file).write_text(lines, encoding="utf-8")
    return folder


def some_text(n_words: int, seed: int) -> str:
    picks = torch.randint(len(WORDS), (n_words,), generator=torch.Generator().manual_seed(seed))
    return " ".join(WORDS[i] for i in picks)
