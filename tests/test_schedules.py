"""Batches whose prompts come and go at random: whatever the schedule, a row says what its prompt says alone."""

from __future__ import annotations

import functools
import itertools
from typing import Any, NamedTuple

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from minisa.engine import LLM
from minisa.generation.row import Chunk
from tests.engines import ENGINES, PROMPTS, WAYS

SHARED = "the beginning that some have in common"
ALONE = {
    "queueing": "eager",
    "graphs": "eager",
}  # what they are held to; the others, to themselves with one row at work

NEVER = 1_000


class Request(NamedTuple):
    """A prompt, when it comes and when it is cancelled, if its row is still at work: after so many chunks of all."""

    prompt: str
    options: tuple[int | None, int, bool, bool]  # of `choices`
    prefixed: bool
    comes: int
    cancelled: int


def choices(max_new_tokens: int | None, seed: int, stop_ids: bool, stop: bool) -> dict[str, Any]:
    return {
        "max_new_tokens": max_new_tokens,
        "seed": seed,
        "stop_ids": [7, 70, 170] if stop_ids else [],
        "stop": ["e", "0"] if stop else [],
    }


REQUESTS = st.lists(
    st.builds(
        Request,
        prompt=st.sampled_from([*PROMPTS, SHARED, SHARED[:13] + "others", SHARED + "!", "x" * 64, "y" * 60]),
        options=st.tuples(st.sampled_from([1, 2, 7, 30, None]), st.integers(0, 1), st.booleans(), st.booleans()),
        prefixed=st.booleans(),
        comes=st.integers(0, 40),
        cancelled=st.just(NEVER) | st.integers(1, 60),
    ),
    min_size=4,
    max_size=9,
)


def play(llm: LLM, requests: list[Request], way: dict[str, Any]) -> list[list[Chunk]]:
    """The chunks of every request; each comes when it is due and a row is free, or when all rows are."""
    prefix, batch = llm.prefix(SHARED), llm.batch(**way)
    due = sorted(range(len(requests)), key=lambda i: requests[i].comes)
    request_of: dict[int, int] = {}  # by what `add` returned
    chunks: list[list[Chunk]] = [[] for _ in requests]
    taken = 0
    while due or batch.free < llm.cache.batch:
        while due and batch.free and (requests[due[0]].comes <= taken or batch.free == llm.cache.batch):
            request = requests[due[0]]
            row = batch.add(request.prompt, **choices(*request.options), prefix=prefix if request.prefixed else None)
            request_of[row] = due.pop(0)
        for chunk in itertools.islice(batch, 1):
            taken += 1
            chunks[request_of[chunk.row]].append(chunk)
            for row, i in request_of.items():
                if requests[i].cancelled == taken:
                    batch.cancel(row)
    assert next(batch, None) is None
    return chunks


@functools.cache
def reference(engine: str) -> LLM:
    return ENGINES[engine]()


@functools.cache
def alone(engine: str, way: str, prompt: str, max_new_tokens: int | None, seed: int, stop_ids: bool, stop: bool) -> Any:
    options = WAYS[way] | choices(max_new_tokens, seed, stop_ids, stop)
    return list(reference(engine).generate(prompt, **options))


@pytest.mark.parametrize(
    ("engine", "way", "schedules"),
    [
        ("eager", "greedy", 5),
        ("eager", "everything", 5),
        ("queueing", "sampled", 5),
        ("queueing", "everything", 5),
        ("graphs", "greedy", 5),
        ("graphs", "everything", 5),
        ("C++ step", "greedy", 30),
        ("C++ step", "sampled", 30),
        ("C++ step", "everything", 30),
        ("bf16 cache", "greedy", 3),
        ("fp8 cache", "everything", 3),
    ],
)
def test_a_row_is_its_prompt_alone_whatever_comes_and_goes(engine: str, way: str, schedules: int) -> None:
    """Rows that finish, are cancelled, are taken again, have much of their prompt in a prefix, or fill the context."""
    llm = ENGINES[engine]()

    @settings(max_examples=schedules, deadline=None, derandomize=True, database=None, phases=[Phase.generate])
    @given(requests=REQUESTS)
    def check(requests: list[Request]) -> None:
        played = play(llm, requests, WAYS[way])
        for request, found in zip(requests, played, strict=True):
            expected = alone(ALONE.get(engine, engine), way, request.prompt, *request.options)
            if request.cancelled == NEVER:
                assert len(found) == len(expected)
            assert [says(chunk) for chunk in found] == [says(chunk) for chunk in expected[: len(found)]]

    check()


def says(chunk: Chunk) -> tuple[int, str, str | None]:
    return chunk.token, chunk.text, chunk.finish_reason
