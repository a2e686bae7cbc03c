"""Prompt lookup: what is guessed, what it may cost, and that the text stays what it is without it."""

from __future__ import annotations

from typing import Any

import pytest

from minisa.generation.speculate import EARNED, MAX_GUESSES, NGRAM, PRICE, TRIED, Price, PromptLookup
from tests.engines import llm_of, text_of, tokens_of

CIRCLES = {"repetition_penalty": 0.01}
REPEATING = "to be or not to be or not to be or"


def test_the_guess_is_how_the_text_went_on_last_time() -> None:
    lookup = PromptLookup([1, 2, 3, 4, 5, 1, 2, 3], tried=MAX_GUESSES)
    assert lookup.guess(limit=99) == [4, 5, 1, 2, 3, 4]
    assert lookup.guess(limit=2) == [4, 5]
    assert lookup.guess(limit=0) == []
    for token in (9, 1, 2, 3):
        lookup.append(token)
    assert lookup.guess(limit=2) == [9, 1]  # the later of two places
    lookup.append(7)
    assert lookup.guess(limit=99) == []
    assert PromptLookup([5] * NGRAM).guess(99) == []
    assert PromptLookup([5] * (NGRAM + 1)).guess(99) == [5] * TRIED


def test_wrong_guesses_cost_no_more_than_the_text_earns() -> None:
    lookup = PromptLookup([1, 2, 3] * 8)
    fed = 0
    for _ in range(1000):
        guesses = lookup.guess(99)
        fed += len(guesses)
        lookup.settle(len(guesses), 0)
    assert 0 < PRICE.of(fed) <= EARNED * 1000 + PRICE.of(TRIED)
    lookup.settle(1, 1)
    assert lookup.guess(99)  # a right one pays for more


def test_an_attempt_may_cost_the_same_whatever_it_guesses() -> None:
    """As where a GPU computes its tokens together: all are guessed or none."""
    lookup = PromptLookup([1, 2, 3] * 8, Price(1.5, 0.0))
    attempts = 0
    for _ in range(1000):
        guesses = lookup.guess(99)
        assert len(guesses) in (0, MAX_GUESSES)
        assert lookup.guess(MAX_GUESSES - 1) == []  # too near the end of the context for all
        attempts += bool(guesses)
        lookup.settle(len(guesses), 0)
    assert 1 < attempts <= 1 + EARNED * 1000 / 1.5
    assert PromptLookup([1, 2, 3] * 8, price=None).guess(99) == []


@pytest.mark.parametrize("queues", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        CIRCLES,
        {"temperature": 0.7, "seed": 3},
        {"repetition_penalty": 1.2},
        {"stop": "o"},
        {"stop_ids": [120, 200]},
    ],
    ids=["greedy", "in circles", "sampled", "penalized", "stop string", "stop ids"],
)
@pytest.mark.parametrize("prompt", ["x", REPEATING])
def test_the_text_is_the_same(prompt: str, options: dict[str, Any], queues: bool) -> None:
    """To the end of the context, where a guess must not reach beyond."""
    plain, guessing = llm_of(), llm_of()
    guessing.runner.asynchronous = queues
    expected = list(plain.generate(prompt, **options))
    found = list(guessing.generate(prompt, speculate=True, **options))
    assert tokens_of(found) == tokens_of(expected) and text_of(found) == text_of(expected)
    assert found[-1].finish_reason == expected[-1].finish_reason
    assert guessing.cache.tokens == plain.cache.tokens
    again = [*prompt.encode(), *tokens_of(found)[:5], 65]
    assert tokens_of(guessing.generate(again, max_new_tokens=8)) == tokens_of(
        llm_of().generate(again, max_new_tokens=8)
    )


def test_repeating_text_takes_fewer_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A penalty below 1 drives the text in circles."""
    llm = llm_of()
    options: dict[str, Any] = {"max_new_tokens": 60, **CIRCLES}
    expected = tokens_of(llm_of().generate("go", **options))
    all_logits, fed = llm.runner.all_logits, []
    monkeypatch.setattr(llm.runner, "all_logits", lambda ids, *rest: fed.append(ids.shape[1]) or all_logits(ids, *rest))
    decode, steps = llm.runner.decode, []
    monkeypatch.setattr(llm.runner, "decode", lambda *inputs: steps.append(1) or decode(*inputs))
    assert tokens_of(llm.generate("go", speculate=True, **options)) == expected
    assert len(fed) + len(steps) < 40
    assert max(fed) == 1 + MAX_GUESSES


def test_closed_early_the_cache_is_what_it_says() -> None:
    llm = llm_of()
    for taken in (1, 2, 7, 20):
        chunks = llm.generate(REPEATING, speculate=True)
        got = [next(chunks).token for _ in range(taken)]
        chunks.close()  # type: ignore[attr-defined]
        follow_up = [*REPEATING.encode(), *got, 33]
        assert tokens_of(llm.generate(follow_up, max_new_tokens=6)) == tokens_of(
            llm_of().generate(follow_up, max_new_tokens=6)
        )
