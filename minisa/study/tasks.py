"""The benchmark tasks: how a row of a published data set becomes text to score.

Rows are one JSON object a line, with the fields that the data sets have on the Hugging Face hub. The protocols are the
usual ones, which EleutherAI's lm-evaluation-harness made common: an answer is scored by the log-likelihood of its text
after the prompt, and few-shot examples are the same texts with their right answers, put before it.

    hellaswag arc_easy piqa    acc: the likeliest answer; acc_norm: the likeliest a character
    mmlu                       the letter A to D after the four choices; five examples of the same subject
    sst2 mrpc rte              the label's word
    winogrande                 two prompts that differ in the word filled in; what follows it is scored
    lambada                    acc: greedy decoding gives the last word; its perplexity
    gsm8k                      generated; acc: the number after "####", as in the examples; last_number: the last one

Fields:

    hellaswag    activity_label, ctx_a, ctx_b, endings, label
    arc_easy     question, choices {text, label}, answerKey
    piqa         goal, sol1, sol2, label
    winogrande   sentence, option1, option2, answer
    mmlu         question, subject, choices, answer
    lambada      text; or context and continuation
    gsm8k        question, answer
    sst2         sentence, label
    mrpc rte     sentence1, sentence2, label
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minisa.errors import MinisaError
from minisa.study.text import read_text

MAX_CHOICES = 32  # of a row, all in the model at once
Row = Mapping[str, Any]
Scores = dict[str, tuple[float, float]]  # metric → (numerator, denominator); a metric is the ratio of their sums


@dataclass(frozen=True, slots=True)
class Question:
    """Answer i after prompt i is choice i; `right` is the index of the right one.

    Tasks with one prompt repeat it. An answer brings the space before it.
    """

    prompts: tuple[str, ...]
    answers: tuple[str, ...]
    right: int

    def example(self) -> str:
        """The question with its right answer, as an example before another question."""
        return self.prompts[self.right] + self.answers[self.right]


@dataclass(frozen=True, slots=True)
class Task:
    """How one data set is read and scored.

    ask: a row's question. score: what choosing from the choices' log-likelihoods is worth, from
    (question, log-likelihoods, whether each is what greedy decoding gives); None for a generated answer.
    metrics: their names, the one that matters most first. topic: the field whose value examples must share.
    """

    name: str
    metrics: tuple[str, ...]
    ask: Callable[[Row], Question]
    score: Callable[[Question, Sequence[float], Sequence[bool]], Scores] | None
    shots: int = 0
    topic: str | None = None
    heading: Callable[[Row], str] = lambda row: ""


def read_rows(path: str | Path) -> list[Row]:
    """The rows of a file of one JSON object a line. MinisaError for what is none."""
    rows: list[Row] = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise MinisaError(f"{path}, line {number}: not JSON ({error}): expected one object a line") from error
        if not isinstance(row, dict):
            raise MinisaError(f"{path}, line {number}: expected a JSON object")
        rows.append(row)
    if not rows:
        raise MinisaError(f"{path}: there are no rows: expected one JSON object a line")
    return rows


def read_questions(
    task: Task, data: str | Path, shots: int, shots_data: str | Path | None, limit: int | None = None
) -> list[Question]:
    """The questions of a file, each with `shots` examples before it: the first of shots_data, a question's own row
    left out. At most `limit` of them.

    Raises MinisaError for a row that is not the task's, and where there are too few examples.
    """
    rows = read_rows(data)[:limit]
    questions = _asked(task, rows, data)
    if shots == 0:
        return [_after(task.heading(row), question) for row, question in zip(rows, questions, strict=True)]
    if shots_data is None:
        raise MinisaError(f"--shots {shots}: needs --shots-data, the file that {task.name}'s examples are taken from")
    pool = read_rows(shots_data)
    pool_questions = _asked(task, pool, shots_data)
    prompted = []
    for row, question in zip(rows, questions, strict=True):
        examples = [
            other.example()
            for candidate, other in zip(pool, pool_questions, strict=True)
            if candidate != row and (task.topic is None or candidate[task.topic] == row[task.topic])
        ][:shots]
        if len(examples) < shots:
            of = f" of {task.topic} {row[task.topic]!r}" if task.topic else ""
            raise MinisaError(f"{shots_data}: {len(examples)} examples{of} for --shots {shots}: take a longer file")
        prompted.append(_after(task.heading(row) + "".join(example + "\n\n" for example in examples), question))
    return prompted


def _after(text: str, question: Question) -> Question:
    return Question(tuple(text + prompt for prompt in question.prompts), question.answers, question.right)


def _asked(task: Task, rows: Sequence[Row], path: str | Path) -> list[Question]:
    questions = []
    for number, row in enumerate(rows, 1):
        try:
            if task.topic is not None and not isinstance(row[task.topic], str):
                raise TypeError(f"its {task.topic} is no text")
            question = task.ask(row)
            if len(question.answers) > MAX_CHOICES:
                raise ValueError(f"{len(question.answers)} choices, expected at most {MAX_CHOICES}")
            if not 0 <= question.right < len(question.answers):
                raise ValueError("its answer is none of its choices")
            if not all(text.strip() for text in question.prompts + question.answers):
                raise ValueError("a prompt or an answer is empty")
        except KeyError as error:
            raise MinisaError(
                f"{path}, row {number}: {error} is missing: expected the fields of {task.name} in study/tasks.py"
            ) from error
        except (ArithmeticError, AttributeError, IndexError, TypeError, ValueError) as error:
            raise MinisaError(f"{path}, row {number}: not a row of {task.name}: {str(error).rstrip('.')}") from error
        questions.append(question)
    return questions


def _best(values: Sequence[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)


def _choice(question: Question, likelihoods: Sequence[float], greedy: Sequence[bool]) -> Scores:
    return {"acc": (float(_best(likelihoods) == question.right), 1.0)}


def _choice_by_length(question: Question, likelihoods: Sequence[float], greedy: Sequence[bool]) -> Scores:
    per_character = [
        value / max(len(answer.removeprefix(" ")), 1)
        for value, answer in zip(likelihoods, question.answers, strict=True)
    ]
    return {
        "acc_norm": (float(_best(per_character) == question.right), 1.0),
        **_choice(question, likelihoods, greedy),
    }


def _choice_with_f1(question: Question, likelihoods: Sequence[float], greedy: Sequence[bool]) -> Scores:
    """F1 of label 1 is 2·TP / (2·TP + FP + FN): itself a ratio of sums over items."""
    chosen = _best(likelihoods)
    return {
        **_choice(question, likelihoods, greedy),
        "f1": (2.0 * (chosen == question.right == 1), float((chosen == 1) + (question.right == 1))),
    }


def _last_word(question: Question, likelihoods: Sequence[float], greedy: Sequence[bool]) -> Scores:
    return {"acc": (float(greedy[0]), 1.0), "perplexity": (-likelihoods[0], 1.0)}


def _same_prompt(prompt: str, answers: Sequence[str], right: int) -> Question:
    return Question((prompt,) * len(answers), tuple(" " + answer for answer in answers), right)


def _hellaswag(row: Row) -> Question:
    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return _same_prompt(_plain(context), [_plain(ending) for ending in row["endings"]], int(row["label"]))


def _plain(text: str) -> str:
    """HellaSwag's WikiHow half without its markup: " [title]" ends a sentence, other [tags] go."""
    text = text.strip().replace(" [title]", ". ")
    # What no bracket closes on its line is matched too, and stays: to look for its end from each "[" takes forever.
    return re.sub(r"\[[^\]\n]*(\]?)", lambda tag: "" if tag[1] else tag[0], text).replace("  ", " ")


def _arc(row: Row) -> Question:
    choices = row["choices"]
    right = choices["label"].index(row["answerKey"])
    return _same_prompt(f"Question: {row['question']}\nAnswer:", choices["text"], right)


def _piqa(row: Row) -> Question:
    return _same_prompt(f"Question: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]], int(row["label"]))


def _mmlu(row: Row) -> Question:
    letters = "ABCD"
    choices = "".join(f"{letter}. {choice}\n" for letter, choice in zip(letters, row["choices"], strict=True))
    return _same_prompt(f"{row['question'].strip()}\n{choices}Answer:", letters, int(row["answer"]))


def _mmlu_heading(row: Row) -> str:
    subject = row["subject"].replace("_", " ")
    return f"The following are multiple choice questions (with answers) about {subject}.\n\n"


def _sst2(row: Row) -> Question:
    prompt = f"{row['sentence']}\nQuestion: Is this sentence positive or negative?\nAnswer:"
    return _same_prompt(prompt, ["negative", "positive"], int(row["label"]))


def _mrpc(row: Row) -> Question:
    prompt = (
        f"Sentence 1: {row['sentence1']}\nSentence 2: {row['sentence2']}\n"
        "Question: Do both sentences mean the same thing?\nAnswer:"
    )
    return _same_prompt(prompt, ["no", "yes"], int(row["label"]))


def _rte(row: Row) -> Question:
    prompt = f"{row['sentence1']}\nQuestion: {row['sentence2']} True or False?\nAnswer:"
    return _same_prompt(prompt, ["True", "False"], int(row["label"]))  # 0 is entailment


def _winogrande(row: Row) -> Question:
    before, after = row["sentence"].split("_")
    prompts = (before + row["option1"], before + row["option2"])
    return Question(prompts, (" " + after.strip(),) * 2, int(row["answer"]) - 1)


def _lambada(row: Row) -> Question:
    context, _, last = row["text"].rpartition(" ") if "text" in row else (row["context"], "", row["continuation"])
    return _same_prompt(context, [last], 0)


def _gsm8k(row: Row) -> Question:
    stated_number(row["answer"])
    return _same_prompt(f"Question: {row['question']}\nAnswer:", [row["answer"]], 0)


GENERATION_STOPS = ("Question:", "</s>", "<|im_end|>")
_STATED = re.compile(r"#### *(-?\$?[\d.,]*\d)")
_NUMBER = re.compile(r"-?\$?\d[\d.,]*")


def stated_number(text: str) -> str:
    """The number after the first "####", as GSM8K's answers end. ValueError where there is none."""
    match = _STATED.search(text)
    if match is None:
        raise ValueError("there is no '#### number'")
    return _canonical(match[1])


def score_numbers(question: Question, answer: str) -> Scores:
    """GSM8K's two scores of a generated answer."""
    wanted = stated_number(question.answers[0])
    stated = _STATED.search(answer)
    numbers = _NUMBER.findall(answer)
    return {
        "acc": (float(stated is not None and _canonical(stated[1]) == wanted), 1.0),
        "last_number": (float(bool(numbers) and _canonical(numbers[-1]) == wanted), 1.0),
    }


def _canonical(number: str) -> str:
    """Without thousands' commas, currency sign and the full stop of the sentence."""
    number = number.replace(",", "").replace("$", "").rstrip(".")
    whole, _, fraction = number.partition(".")
    return whole if not fraction.strip("0") else f"{whole}.{fraction}"


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("hellaswag", ("acc_norm", "acc"), _hellaswag, _choice_by_length),
        Task("mmlu", ("acc",), _mmlu, _choice, shots=5, topic="subject", heading=_mmlu_heading),
        Task("gsm8k", ("acc", "last_number"), _gsm8k, None, shots=5),
        Task("sst2", ("acc",), _sst2, _choice),
        Task("mrpc", ("acc", "f1"), _mrpc, _choice_with_f1),
        Task("rte", ("acc",), _rte, _choice),
        Task("lambada", ("acc", "perplexity"), _lambada, _last_word),
        Task("arc_easy", ("acc_norm", "acc"), _arc, _choice_by_length),
        Task("piqa", ("acc_norm", "acc"), _piqa, _choice_by_length),
        Task("winogrande", ("acc",), _winogrande, _choice),
    )
}
