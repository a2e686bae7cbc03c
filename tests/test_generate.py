"""The streaming generator on a tiny random model whose tokens are bytes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from minisa.cache import StaticCache
from minisa.errors import MinisaError
from minisa.generation.row import StopStrings
from minisa.runners.eager import TorchRunner
from tests.engines import PROMPTS, byte_llm, llm_of, text_of, tokens_of
from tests.models import PLANS, SIX_LAYERS, build_model


def test_greedy_is_the_argmax_of_the_logits() -> None:
    llm = llm_of()
    ids = list(b"hello")
    for token in tokens_of(llm.generate("hello", max_new_tokens=12)):
        assert token == llm.logits(ids)[-1].argmax()
        ids.append(token)


@pytest.mark.parametrize("queues", [False, True], ids=["waits", "queues the next step first"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 1.0, "seed": 5},
        {"temperature": 0.8, "seed": 5, "top_k": 40, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.3},
    ],
    ids=["greedy", "sampled", "everything"],
)
def test_a_row_of_a_batch_equals_the_row_alone(options: dict[str, Any], queues: bool) -> None:
    """Rows end at different times: the first to meet byte 7, 70 or 170 stops, others run to their limit."""
    llm = llm_of()
    llm.runner.asynchronous = queues
    options |= {"max_new_tokens": 50, "stop_ids": [7, 70, 170]}
    together = list(llm.generate(PROMPTS, **options))
    lengths = set()
    for row, prompt in enumerate(PROMPTS):
        alone = list(llm_of().generate(prompt, **options))
        assert tokens_of(together, row) == tokens_of(alone)
        assert text_of(together, row) == text_of(alone)
        lengths.add(len(alone))
    assert len(lengths) > 1


def test_repetition_penalty_counts_the_prompt_and_the_answer() -> None:
    llm = llm_of()
    answer = tokens_of(llm.generate("abc", max_new_tokens=40, repetition_penalty=1e9))
    assert len(set(answer)) == 40
    assert not set(answer) & set(b"abc")


def test_finish_reasons() -> None:
    llm = llm_of(max_seq_len=20)
    *_, last = llm.generate("hello", max_new_tokens=3)
    assert (last.finish_reason, last.stats.new_tokens) == ("length", 3)  # type: ignore[union-attr]
    free = list(llm.generate("hello"))
    assert free[-1].finish_reason == "context"
    assert len(free) == 16  # 15 slots are free; the last token needs none
    assert [chunk.finish_reason for chunk in free[:-1]] == [None] * 15
    third = tokens_of(free)[2]
    stopped = list(llm.generate("hello", stop_ids=[third]))
    assert tokens_of(stopped) == tokens_of(free)[: tokens_of(free).index(third) + 1]
    assert stopped[-1].finish_reason == "stop"
    assert text_of(stopped) == llm.tokenizer.decode(tokens_of(stopped)[:-1])  # the stop token itself is not shown
    *_, full = llm.generate("x" * 20)
    assert (full.finish_reason, full.stats.new_tokens) == ("context", 1)  # type: ignore[union-attr]


def test_stop_strings_end_the_text_before_them() -> None:
    llm = llm_of()
    whole = text_of(llm.generate("hello", max_new_tokens=40))
    stop = whole[7:10]
    stopped = list(llm.generate("hello", max_new_tokens=40, stop=stop))
    assert text_of(stopped) == whole[: whole.index(stop)]
    assert stopped[-1].finish_reason == "stop"
    assert text_of(llm.generate("hello", max_new_tokens=40, stop=["never to be found"])) == whole


def test_stop_strings_hold_back_only_what_may_become_one() -> None:
    stops = StopStrings(["<end>", "xyz"])
    assert [stops.feed(piece) for piece in ("a", "<e", "n", "x", "y", "q<end", "> tail", "more")] == [
        "a", "", "", "<en", "", "xyq", "", "",
    ]  # fmt: skip
    assert stops.found
    assert stops.flush() == ""
    open_ended = StopStrings(["<end>"])
    assert open_ended.feed("x<en") + open_ended.flush() == "x<en"


def test_only_new_tokens_of_a_longer_prompt_are_computed() -> None:
    llm = llm_of()
    *_, first = list(llm.generate("hello", max_new_tokens=5))
    answer = tokens_of(llm.generate("hello", max_new_tokens=5))
    longer = [*b"hello", *answer, *b" and more"]
    chunks = list(llm.generate(longer, max_new_tokens=8))
    # Of "hello" and five tokens the last was never fed.
    assert chunks[-1].stats.reused_tokens == 5 + 4  # type: ignore[union-attr]
    assert tokens_of(chunks) == tokens_of(llm_of().generate(longer, max_new_tokens=8))
    assert first.stats is not None
    assert first.stats.reused_tokens == 0
    changed = [*b"help", *longer]
    again = list(llm.generate(changed, max_new_tokens=8))
    assert again[-1].stats.reused_tokens == 3  # type: ignore[union-attr]
    assert tokens_of(again) == tokens_of(llm_of().generate(changed, max_new_tokens=8))


def test_a_prefix_is_computed_once_for_every_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """One longer than the prompt, one the prompt leaves half-way, and one it has nothing of."""
    llm = llm_of()
    prefix = llm.prefix("the system prompt")
    fed: list[int] = []
    prefill = llm.runner.prefill
    monkeypatch.setattr(llm.runner, "prefill", lambda ids, *rest: fed.append(ids.shape[1]) or prefill(ids, *rest))
    prompts = ["the system prompt and more", "the system", "the sister", "other"]
    chunks = list(llm.generate(prompts, max_new_tokens=12, prefix=prefix))
    assert fed == [9, 1, 5, 5]
    for row, (prompt, reused) in enumerate(zip(prompts, [17, 9, 5, 0], strict=True)):
        assert tokens_of(chunks, row) == tokens_of(llm_of().generate(prompt, max_new_tokens=12))
        assert next(c.stats.reused_tokens for c in chunks if c.row == row and c.stats) == reused
    assert llm.prefix(list(b"ids")).cache.tokens == [list(b"ids")]


def test_a_prefix_serves_a_dialog_until_the_cache_holds_more() -> None:
    llm = llm_of()
    answer = tokens_of(llm.generate("the system prompt: hi", max_new_tokens=3))
    prefix = llm.prefix("the system prompt")
    longer = [*b"the system prompt: hi", *answer, *b" again"]
    for expected, prompt in ((21 + 2, longer), (17, [*b"the system prompt!"])):
        *_, last = llm.generate(prompt, max_new_tokens=2, prefix=prefix)
        assert last.stats is not None and last.stats.reused_tokens == expected
    list(llm.generate(["other", "rows"], max_new_tokens=2))
    assert tokens_of(llm.generate(longer, max_new_tokens=8, prefix=prefix)) == tokens_of(
        llm_of().generate(longer, max_new_tokens=8)
    )


@pytest.mark.parametrize("taken", [1, 4])
def test_closing_early_keeps_the_cache_usable(taken: int) -> None:
    llm = llm_of()
    chunks = llm.generate("hello", max_new_tokens=20)
    got = [next(chunks).token for _ in range(taken)]
    chunks.close()  # type: ignore[attr-defined]
    follow_up = [*b"hello", *got, *b"!"]
    resumed = list(llm.generate(follow_up, max_new_tokens=10))
    assert resumed[-1].stats.reused_tokens == 5 + taken - 1  # type: ignore[union-attr]
    assert tokens_of(resumed) == tokens_of(llm_of().generate(follow_up, max_new_tokens=10))


def test_an_engine_in_each_thread() -> None:
    """Two of them share a model's weights; each has its cache."""
    expected = [tokens_of(llm_of().generate(prompt, max_new_tokens=20)) for prompt in PROMPTS]
    model = build_model(SIX_LAYERS, PLANS["head maps"])

    def answer(number: int) -> list[int]:
        llm = llm_of() if number % 2 else llm_of(model=model)
        return tokens_of(llm.generate(PROMPTS[number], max_new_tokens=20))

    with ThreadPoolExecutor(len(PROMPTS)) as threads:
        for _ in range(3):
            assert list(threads.map(answer, range(len(PROMPTS)))) == expected


def test_a_superseded_generation_ends_with_an_error_not_with_wrong_text() -> None:
    llm = llm_of()
    old = llm.generate("hello", max_new_tokens=20)
    next(old)
    list(llm.generate("other", max_new_tokens=2))
    with pytest.raises(MinisaError, match="another generation has begun"):
        next(old)


def test_logits_leave_the_cache_alone() -> None:
    llm = llm_of()
    list(llm.generate("hello", max_new_tokens=5))
    before = llm.cache.keys.clone(), llm.cache.values.clone()
    logits = llm.logits(list(range(128)))  # longer than the cache, which plays no part
    logits /= 2  # they are the caller's
    assert logits.shape == (128, SIX_LAYERS.vocab_size)
    assert logits.dtype == torch.float32
    assert torch.equal(before[0], llm.cache.keys)
    assert torch.equal(before[1], llm.cache.values)
    beyond = [1] * (SIX_LAYERS.max_seq_len + 1)
    with pytest.raises(MinisaError, match=rf"token_ids is {len(beyond)} tokens long, the context {len(beyond) - 1}"):
        llm.logits(beyond)


def test_stats_count_what_happened() -> None:
    llm = llm_of()
    *_, last = llm.generate("hello", max_new_tokens=9)
    stats = last.stats
    assert stats is not None
    assert (stats.prompt_tokens, stats.new_tokens) == (5, 9)
    assert stats.time_to_first_token > 0
    assert stats.prompt_tokens_per_second == pytest.approx(5 / stats.time_to_first_token)
    assert stats.tokens_per_second > 0
    assert stats.peak_memory > 50e6  # at least the interpreter and torch


@pytest.mark.parametrize(
    ("prompt", "options", "says"),
    [
        ("", {}, "the prompt is empty: give some text"),
        ([], {}, "no prompts for max_batch 4: give some"),
        ([[]], {}, "the prompt is empty: expected text or token ids"),
        ([300], {}, "the prompt has 300: expected text or token ids, 0 to 255"),
        ([-1], {}, "the prompt has -1"),
        ([1, 2.5], {}, "the prompt has 2.5"),
        ([{"role": "user", "content": "a"}], {}, "the prompt has 'role'"),
        ("x" * 97, {}, "the prompt is 97 tokens long, the context 96"),
        (["a"] * 5, {}, "5 prompts for max_batch 4: .* with a larger max_batch"),
        ("a", {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ("a", {"max_new_tokens": True}, "max_new_tokens is True: expected 1 or more"),
        ("a", {"top_p": 2.0}, "top_p is 2.0"),
        ("a", {"stop": ""}, "empty stop string"),
        (["a", "b"], {"seed": [1]}, "1 seeds for 2 prompts"),
        (["a", "b"], {"speculate": True}, "speculate is for one prompt, 2 are given"),
        ("a", {"stop": [5]}, r"stop is \[5\]: expected a string"),
        ("a", {"max_new_tokens": 2.5}, "max_new_tokens is 2.5"),
        ("a", {"prefix": llm_of().prefix("a")}, "prefix is another model's"),
    ],
)
def test_bad_requests_are_refused_before_anything_runs(prompt: Any, options: dict[str, Any], says: str) -> None:
    with pytest.raises(MinisaError, match=says):
        llm_of().generate(prompt, **options)


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"speculate": True}])
def test_logits_that_are_not_finite_are_said(options: dict[str, Any]) -> None:
    llm = llm_of()
    llm.model.norm.weight.fill_(3e38)
    with pytest.raises(MinisaError, match="are not finite: the weights are damaged, or"):
        next(llm.generate("abcabcabc", **options))


def test_what_overflows_bf16_may_fit_fp32() -> None:
    model = build_model(SIX_LAYERS, PLANS["none"])
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    cache = StaticCache.allocate(SIX_LAYERS, PLANS["none"], max_seq_len=32, dtype=torch.bfloat16)
    llm = byte_llm(cache, TorchRunner(model))
    model.norm.weight.fill_(3e38)
    with pytest.raises(MinisaError, match=r"or too large for bf16: fetch the model again, or take dtype fp32$"):
        next(llm.generate("abc"))


def compare_compiled_with_eager() -> None:
    plain, compiled = (llm_of(max_seq_len=400, max_batch=1, compile=compile) for compile in (False, True))
    assert (plain.runner.name, compiled.runner.name) == ("eager", "torch.compile")
    for prompt in ("x" * 250, "y" * 30):
        expected = tokens_of(plain.generate(prompt, max_new_tokens=20))
        assert tokens_of(compiled.generate(prompt, max_new_tokens=20)) == expected
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs == 4, f"{graphs} graphs: each part of a layer is compiled once, for every layer and every length"


def compile_for_many_rows() -> None:
    """Past eight of them torch gives up by default. Its compiler's front end alone, whose limit it is, will do."""
    front_end: Any = partial(torch.compile, backend="eager", fullgraph=True, dynamic=False)
    torch.compile = lambda function, **_: front_end(function)  # type: ignore[assignment]
    llm = llm_of(max_batch=9, compile=True)
    for n_rows in range(1, 10):
        assert len(list(llm.generate(["a"] * n_rows, max_new_tokens=2))) == 2 * n_rows


@pytest.mark.parametrize("compiling", [compare_compiled_with_eager, compile_for_many_rows])
def test_compiled_decoding_gives_the_same_text(compiling: Callable[[], None]) -> None:
    """Other layers, longer contexts and a second prompt compile nothing anew; other numbers of rows do.

    In a process of its own: torch.compile imports setuptools, which clashes with what pytest has imported.
    """
    script = f"from tests.test_generate import {compiling.__name__} as compiling; compiling()"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[1])
