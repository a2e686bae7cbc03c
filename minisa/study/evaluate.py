"""Evaluations: text or questions, cut into batches that a model answers with one record an item.

An item's record has its scores, each a numerator and a denominator (compare.py), and what they came from: an item's
answers can be held against another implementation's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from minisa.cache import StaticCache
from minisa.device import one_torch_thread
from minisa.engine import LLM
from minisa.generation.generate import generate
from minisa.generation.row import Options
from minisa.study.likelihood import Item, batches, encode, likelihoods
from minisa.study.loss import token_losses, window_cache
from minisa.study.results import Record
from minisa.study.tasks import GENERATION_STOPS, Question, Scores, Task, score_numbers
from minisa.study.text import windows
from minisa.text.tokenizer import check_ids

ANSWER_TOKENS = 256  # that a generated answer may take


class Evaluation(Protocol):
    """Items, numbered from 0, and how a model is scored on them.

    metrics: names of the scores in every record, the one that matters most first.
    cut: items too long for the model, whose beginnings are left out.
    cost: about how many tokens an item takes. batches: the items that go through a model together.
    run: one record for each item of a batch.
    """

    @property
    def metrics(self) -> tuple[str, ...]: ...
    @property
    def cut(self) -> int: ...
    def __len__(self) -> int: ...
    def cost(self, item: int) -> int: ...
    def batches(self, items: Sequence[int]) -> list[list[int]]: ...
    def run(self, llm: LLM, batch: Sequence[int]) -> list[Record]: ...


@dataclass(frozen=True, slots=True)
class Perplexity:
    """Windows [N, length] of a text; an item is a window, its score the loss in nats over its tokens but the first.

    as_run: whether the model's runner computes it, one window after the other, and not PyTorch.
    """

    windows: Tensor
    max_tokens: int
    as_run: bool = False
    metrics: tuple[str, ...] = ("perplexity",)
    cut: int = 0

    @classmethod
    def of(
        cls, llm: LLM, path: str | Path, length: int, limit: int | None, max_tokens: int, as_run: bool = False
    ) -> Perplexity:
        return cls(windows(llm, path, length, limit), max_tokens, as_run)

    def __len__(self) -> int:
        return len(self.windows)

    def cost(self, item: int) -> int:
        return self.windows.shape[1]

    def batches(self, items: Sequence[int]) -> list[list[int]]:
        together = max(self.max_tokens // self.windows.shape[1], 1)
        return [list(items[start : start + together]) for start in range(0, len(items), together)]

    def run(self, llm: LLM, batch: Sequence[int]) -> list[Record]:
        chosen = self.windows[list(batch)]
        if self.as_run:
            losses = torch.stack([losses_as_run(llm, window) for window in chosen]).double()
        else:
            losses = token_losses(llm.model, chosen, batch=len(batch)).double()
        return [{"scores": known({"perplexity": (row.sum().item(), float(len(row)))}, row.tolist())} for row in losses]


@dataclass(frozen=True, slots=True)
class Choices:
    """Questions whose choices are scored by likelihood."""

    task: Task
    questions: tuple[Question, ...]
    items: tuple[Item, ...]
    max_tokens: int

    @classmethod
    def of(cls, llm: LLM, task: Task, questions: Sequence[Question], max_tokens: int) -> Choices:
        items = [
            Item.of(
                [
                    encode(llm.tokenizer, prompt, answer, llm.config.max_seq_len)
                    for prompt, answer in zip(question.prompts, question.answers, strict=True)
                ]
            )
            for question in questions
        ]
        for number, item in enumerate(items, 1):
            for choice in item.choices:
                check_ids(choice.ids, llm.config.vocab_size, f"row {number}, by the model's tokenizer,")
        return cls(task, tuple(questions), tuple(items), max_tokens)

    @property
    def metrics(self) -> tuple[str, ...]:
        return self.task.metrics

    @property
    def cut(self) -> int:
        return sum(any(choice.cut for choice in item.choices) for item in self.items)

    def __len__(self) -> int:
        return len(self.items)

    def cost(self, item: int) -> int:
        return self.items[item].tokens

    def batches(self, items: Sequence[int]) -> list[list[int]]:
        found = batches([self.items[item] for item in items], self.max_tokens)
        return [[items[i] for i in batch] for batch in found]

    def run(self, llm: LLM, batch: Sequence[int]) -> list[Record]:
        assert self.task.score is not None
        records = []
        for item, found in zip(batch, likelihoods(llm.model, [self.items[item] for item in batch]), strict=True):
            totals = [choice.total for choice in found]
            scores = self.task.score(self.questions[item], totals, [choice.greedy for choice in found])
            records.append({"scores": known(scores, totals), "log_likelihoods": totals})
        return records


@dataclass(frozen=True, slots=True)
class Generation:
    """Questions whose answers are generated, greedily, up to ANSWER_TOKENS tokens or to the next question."""

    task: Task
    questions: tuple[Question, ...]
    prompts: tuple[list[int], ...]
    max_tokens: int
    cut: int

    @classmethod
    def of(cls, llm: LLM, task: Task, questions: Sequence[Question], max_tokens: int) -> Generation:
        tokenizer = llm.tokenizer
        room = max(llm.config.max_seq_len - ANSWER_TOKENS, 1)
        prompts = [tokenizer.bos_ids + tokenizer.encode(question.prompts[0]) for question in questions]
        for number, prompt in enumerate(prompts, 1):
            check_ids(prompt, llm.config.vocab_size, f"row {number}, by the model's tokenizer,")
        cut = sum(len(prompt) > room for prompt in prompts)
        return cls(task, tuple(questions), tuple(prompt[-room:] for prompt in prompts), max_tokens, cut)

    @property
    def metrics(self) -> tuple[str, ...]:
        return self.task.metrics

    def __len__(self) -> int:
        return len(self.prompts)

    def cost(self, item: int) -> int:
        return len(self.prompts[item]) + ANSWER_TOKENS

    def batches(self, items: Sequence[int]) -> list[list[int]]:
        order = sorted(items, key=lambda item: (-self.cost(item), item))
        together = max(self.max_tokens // self.cost(order[0]), 1) if order else 1
        return [order[start : start + together] for start in range(0, len(order), together)]

    def run(self, llm: LLM, batch: Sequence[int]) -> list[Record]:
        prompts = [self.prompts[item] for item in batch]
        length = min(max(map(len, prompts)) + ANSWER_TOKENS, llm.config.max_seq_len)
        cache = window_cache(llm.model, len(batch), length)
        options = Options(max_new_tokens=ANSWER_TOKENS, stop=GENERATION_STOPS, stop_ids=llm.tokenizer.eos_ids)
        texts = [""] * len(batch)
        with torch.inference_mode():
            for chunk in generate(llm.runner, cache, llm.tokenizer, prompts, options):
                texts[chunk.row] += chunk.text
        return [
            {"scores": score_numbers(self.questions[item], text), "answer": text}
            for item, text in zip(batch, texts, strict=True)
        ]


@torch.inference_mode()
def losses_as_run(llm: LLM, window: Tensor) -> Tensor:
    """token_losses of one window [length], by what runs the model: fp32 [length - 1] on the CPU."""
    tokens = window.to(llm.device)
    cache = StaticCache.allocate(
        llm.config, llm.plan, max_seq_len=len(window), device=llm.device, dtype=llm.cache.values.dtype
    )
    losses, start = [], 1
    for logits in llm.runner.all_logits(tokens[None], 0, cache):
        wanted = tokens[start : start + len(logits)]
        with one_torch_thread():  # others would spin on after it, on cores that the next C++ step needs
            losses.append(F.cross_entropy(logits[: len(wanted)].float(), wanted, reduction="none").cpu())
        start += len(logits)
    return torch.cat(losses)


def known(scores: Scores, found: Sequence[float]) -> Scores:
    """The scores, unless what they were made from are no numbers: then NaN, where a choice would be the first's."""
    if all(map(math.isfinite, found)):
        return scores
    return {metric: (math.nan, denominator) for metric, (_, denominator) in scores.items()}


def questions_for(llm: LLM, task: Task, questions: Sequence[Question], max_tokens: int) -> Evaluation:
    """The evaluation that suits a task."""
    if task.score is None:
        return Generation.of(llm, task, questions, max_tokens)
    return Choices.of(llm, task, questions, max_tokens)
