"""A row of each of eval's tasks, as its makers wrote it, and the text that is scored; and words to fill others with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

WORDS = ["the", "cat", "sat", "on", "a", "mat", "while", "rain", "fell", "over", "quiet", "red", "roof", "in", "town"]

HELLASWAG = {
    "activity_label": "Baking",
    "ctx_a": "[header] How to bake [title] Mix flour. [step] Stir.",
    "ctx_b": "then HE",
    "endings": ["stirs.", "[title] Bake it. [step] Eat  up.", "sleeps."],
    "label": "1",
}
ARC = {"question": "What is hot?", "choices": {"text": ["ice", "fire"], "label": ["A", "B"]}, "answerKey": "B"}
PIQA = {"goal": "Boil an egg.", "sol1": "Use water.", "sol2": "Use sand, a lot of sand.", "label": 0}
MMLU = {"question": " One plus one? ", "subject": "easy_sums", "choices": ["1", "2", "3", "4"], "answer": 1}
SST2 = {"sentence": "a fine film ", "label": 1}
MRPC = {"sentence1": "He ran .", "sentence2": "He was running .", "label": 1}
RTE = {"sentence1": "It rains.", "sentence2": "It is dry.", "label": 1}
WINOGRANDE = {
    "sentence": "The cup missed the bag as the _ was small.",
    "option1": "cup",
    "option2": "bag",
    "answer": "2",
}
LAMBADA = {"context": "He met Ann and said: hello,", "continuation": "Ann"}
GSM8K = {"question": "Two and two?", "answer": "2 + 2 = <<2+2=4>>4\n#### 1,004"}
ROWS = {
    "hellaswag": HELLASWAG, "arc_easy": ARC, "piqa": PIQA, "mmlu": MMLU, "sst2": SST2, "mrpc": MRPC, "rte": RTE,
    "winogrande": WINOGRANDE, "lambada": LAMBADA, "gsm8k": GSM8K,
}  # fmt: skip
TEXTS = {
    "hellaswag": (
        ["Baking: How to bake. Mix flour. Stir. Then he"] * 3,
        [" stirs.", "  Bake it. Eat up.", " sleeps."],
        1,
    ),
    "arc_easy": (["Question: What is hot?\nAnswer:"] * 2, [" ice", " fire"], 1),
    "piqa": (["Question: Boil an egg.\nAnswer:"] * 2, [" Use water.", " Use sand, a lot of sand."], 0),
    "mmlu": (
        [
            "The following are multiple choice questions (with answers) about easy sums.\n\n"
            "One plus one?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:"
        ]
        * 4,
        [" A", " B", " C", " D"],
        1,
    ),
    "sst2": (
        ["a fine film \nQuestion: Is this sentence positive or negative?\nAnswer:"] * 2,
        [" negative", " positive"],
        1,
    ),
    "mrpc": (
        [
            "Sentence 1: He ran .\nSentence 2: He was running .\n"
            "Question: Do both sentences mean the same thing?\nAnswer:"
        ]
        * 2,
        [" no", " yes"],
        1,
    ),
    "rte": (["It rains.\nQuestion: It is dry. True or False?\nAnswer:"] * 2, [" True", " False"], 1),
    "winogrande": (
        ["The cup missed the bag as the cup", "The cup missed the bag as the bag"],
        [" was small.", " was small."],
        1,
    ),
    "lambada": (["He met Ann and said: hello,"], [" Ann"], 0),
    "gsm8k": (["Question: Two and two?\nAnswer:"], [" 2 + 2 = <<2+2=4>>4\n#### 1,004"], 0),
}


def write_rows(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def some_text(n_words: int, seed: int) -> str:
    picks = torch.randint(len(WORDS), (n_words,), generator=torch.Generator().manual_seed(seed))
    return " ".join(WORDS[i] for i in picks)
