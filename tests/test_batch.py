"""Batches whose prompts come and go, step by step: who joins, leaves, is refused or fails."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from minisa.cache import StaticCache
from minisa.engine import LLM
from minisa.errors import MinisaError
from tests.engines import ENGINES, PROMPTS, WAYS, llm_of, text_of, tokens_of


def test_rows_join_leave_and_are_taken_again() -> None:
    """add and cancel between chunks; the numbers go on, though the row is the same."""
    llm = llm_of(max_batch=2)
    batch = llm.batch()
    assert batch.free == 2
    first, second = batch.add(PROMPTS[0], max_new_tokens=3), batch.add(PROMPTS[1])
    assert (first, second, batch.free) == (0, 1, 0)
    seen = [next(batch).row for _ in range(5)]
    assert seen == [0, 1, 0, 1, 0]  # one token of each at a time
    assert batch.free == 1  # the first had three
    third = batch.add(PROMPTS[2], max_new_tokens=2)
    assert third == 2
    assert next(batch).row == second  # it was chosen together with the last of the first
    batch.cancel(second)
    assert batch.free == 1
    batch.cancel(second)
    batch.cancel(first)
    rest = list(batch)
    assert [chunk.row for chunk in rest] == [third, third]
    assert tokens_of(rest, third) == tokens_of(llm_of().generate(PROMPTS[2], max_new_tokens=2))
    assert batch.free == 2
    with pytest.raises(MinisaError, match="cancel: no row 3 has been added"):
        batch.cancel(3)


def test_what_was_chosen_for_a_cancelled_row_is_not_given_out() -> None:
    """Nor is it taken for a token of the prompt that has the row now."""
    batch = llm_of(max_batch=2).batch()
    batch.add(PROMPTS[0])
    second = batch.add(PROMPTS[1])
    next(batch)
    batch.cancel(second)
    third = batch.add(PROMPTS[2], max_new_tokens=4)
    found = list(itertools.islice(batch, 12))
    assert {chunk.row for chunk in found} == {0, third}
    assert tokens_of(found, third) == tokens_of(llm_of().generate(PROMPTS[2], max_new_tokens=4))


def test_iteration_ends_and_is_taken_up_again() -> None:
    """Left between two rows' tokens, with one of them chosen and not given out; and after its end."""
    options = {"max_new_tokens": 5, "repetition_penalty": 1.3}
    batch = llm_of().batch(repetition_penalty=1.3)
    assert list(batch) == []
    for _ in range(2):
        rows = [batch.add(prompt, max_new_tokens=5) for prompt in PROMPTS[:2]]
        found = [next(iter(batch)), *batch]
        assert next(batch, None) is None
        for row, prompt in zip(rows, PROMPTS[:2], strict=True):
            assert tokens_of(found, row) == tokens_of(llm_of().generate(prompt, **options))


def test_steps_take_in_rows_up_to_the_highest_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = llm_of()
    widths: list[int] = []
    decode = llm.runner.decode
    monkeypatch.setattr(llm.runner, "decode", lambda ids, *rest: widths.append(len(ids)) or decode(ids, *rest))
    list(llm.generate(PROMPTS, max_new_tokens=3))
    assert widths == [4, 4]
    widths.clear()
    batch = llm.batch()
    for new_tokens in (9, 2, 4):
        batch.add("x", max_new_tokens=new_tokens)
    while batch.free < 2:
        next(batch)
    batch.add("y", max_new_tokens=3)
    list(batch)
    assert widths == [3, 3, 3, 2, 1, 1, 1, 1]  # the newcomer takes the second row, not the fourth


def test_a_runner_that_prepares_for_a_number_of_rows_meets_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling anew whenever a row comes or goes would take seconds; past a limit of its own the compiler gives up."""
    monkeypatch.setattr("minisa.runners.eager.compile_layers", lambda model, on_gpu: None)
    llm = llm_of(compile=True)
    widths: list[int] = []
    decode = llm.runner.decode
    monkeypatch.setattr(llm.runner, "decode", lambda ids, *rest: widths.append(len(ids)) or decode(ids, *rest))
    batch = llm.batch(repetition_penalty=1.3)
    rows = [batch.add(prompt, max_new_tokens=3 + i) for i, prompt in enumerate(PROMPTS[:3])]
    chunks = list(batch)
    assert widths == [4, 4, 4, 4]
    for row, prompt in zip(rows, PROMPTS, strict=False):
        alone = llm_of().generate(prompt, max_new_tokens=3 + row, repetition_penalty=1.3)
        assert tokens_of(chunks, row) == tokens_of(alone)


def test_times_of_a_row_begin_with_its_own_add(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that goes on by one whenever it is looked at."""
    clock = itertools.count(1)
    monkeypatch.setattr("time.perf_counter", lambda: float(next(clock)))
    batch = llm_of().batch()
    batch.add("a", max_new_tokens=4)  # at 1
    next(batch)  # read at 2
    next(batch)  # at 3
    batch.add("b", max_new_tokens=3)  # at 4
    stats = {chunk.row: chunk.stats for chunk in batch if chunk.stats}  # both read at 5, 6; the second also at 7
    assert (stats[0].time_to_first_token, stats[1].time_to_first_token) == (1, 1)
    assert stats[0].tokens_per_second == 3 / (6 - 2)
    assert stats[1].tokens_per_second == 2 / (7 - 5)


@pytest.mark.parametrize("way", ["greedy", "everything"])
@pytest.mark.parametrize("engine", ["eager", "queueing", "graphs", "C++ step"])
def test_a_row_whose_logits_are_not_finite_ends_alone(engine: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the rows beside it nor the next one in its place meet its NaNs."""
    llm, options = ENGINES[engine](), {"max_new_tokens": 8, "seed": 3}
    expected = {prompt: tokens_of(llm.generate(prompt, **WAYS[way], **options)) for prompt in ("good", "next")}
    prefill = llm.runner.prefill

    def overflowing(ids: torch.Tensor, start: int, cache: StaticCache) -> torch.Tensor:
        logits = prefill(ids, start, cache)
        if ord("!") in ids:
            cache.values.fill_(float("nan"))
        return logits

    monkeypatch.setattr(llm.runner, "prefill", overflowing)
    batch = llm.batch(**WAYS[way])
    batch.add("bad!", **options)
    good = batch.add("good", **options)
    chunks = [next(batch), next(batch)]
    with pytest.raises(MinisaError, match="row 0: its logits are not finite: the weights are damaged"):
        next(batch)
    chunks.append(next(batch))
    third = batch.add("next", **options)
    chunks += batch
    assert len(tokens_of(chunks, 0)) == 1
    assert (tokens_of(chunks, good), tokens_of(chunks, third)) == (expected["good"], expected["next"])


def test_a_batch_and_a_generation_take_the_cache_from_each_other() -> None:
    llm = llm_of()
    old = llm.generate("hello", max_new_tokens=20)
    next(old)
    batch = llm.batch()
    with pytest.raises(MinisaError, match="another generation has begun"):
        next(old)
    batch.add("hello", max_new_tokens=3)
    list(batch)
    *_, last = llm.generate("hello", max_new_tokens=3)
    assert last.stats is not None and last.stats.reused_tokens == 4  # of what the batch left in the row
    with pytest.raises(MinisaError, match="another generation has begun"):
        batch.add("more")
    with pytest.raises(MinisaError, match="another generation has begun"):
        next(batch)


@pytest.mark.parametrize(
    ("prompt", "options", "says"),
    [
        ("", {}, "the prompt is empty"),
        ([], {}, "the prompt is empty"),
        ([300], {}, "the prompt has 300"),
        ("x" * 97, {}, "97 tokens long, the context 96"),
        ("a", {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ("a", {"stop": ""}, "empty stop string"),
        ("a", {"seed": 1 << 64}, "seed is"),
        ("a", {"seed": [1, 2]}, "2 seeds for 1 prompts"),
        ("a", {"temperature": 1.0}, "add: temperature is not a row's own: give it to batch"),
    ],
)
def test_a_bad_prompt_is_refused_and_takes_no_row(prompt: Any, options: dict[str, Any], says: str) -> None:
    batch = llm_of().batch()
    with pytest.raises(MinisaError, match=says):
        batch.add(prompt, **options)
    assert batch.free == 4


def test_what_a_batch_refuses() -> None:
    llm = llm_of(max_batch=1)
    with pytest.raises(MinisaError, match="top_p is 2"):
        llm.batch(top_p=2)
    with pytest.raises(TypeError, match="unexpected keyword argument 'seed'"):
        llm.batch(temperature=1.0, seed=1)
    batch = llm.batch()
    with pytest.raises(MinisaError, match="prefix is another model's"):
        batch.add("a", prefix=llm_of().prefix("a"))
    batch.add("a")
    with pytest.raises(MinisaError, match="all 1 rows are taken: go on until one ends, cancel one, or load with"):
        batch.add("b")


@pytest.mark.real_model
def test_chats_are_answered_as_by_chat(smollm2: LLM) -> None:
    """In the chat format, up to the end of the turn, and as a text of its own."""
    chats = [
        [{"role": "user", "content": "What is the capital of France?"}],
        [{"role": "system", "content": "Answer with one word."}, {"role": "user", "content": "Say yes."}],
    ]
    expected = [text_of(smollm2.chat(messages, max_new_tokens=30)) for messages in chats]
    batch = smollm2.batch()
    for messages in chats:
        batch.add(messages, max_new_tokens=30)
    chunks = list(batch)
    assert [text_of(chunks, row) for row in range(2)] == expected
    assert next(chunk.finish_reason for chunk in chunks if chunk.row == 0 and chunk.stats) == "stop"
