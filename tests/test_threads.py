"""One engine and several who use it: threads, and whoever presses Ctrl-C in the middle of a step."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from minisa.errors import MinisaError
from tests.engines import ENGINES, PROMPTS, llm_of, text_of, tokens_of


@pytest.mark.parametrize("engine", ["eager", "C++ step"])
def test_threads_take_the_cache_from_each_other(engine: str, one_thread: None) -> None:
    """A generation ends with what its prompt says alone or with an error; nobody else's step comes between."""
    llm = ENGINES[engine]()
    expected = {prompt: tokens_of(llm.generate(prompt, max_new_tokens=20)) for prompt in PROMPTS}
    logits = llm.logits(list(b"hello"))

    def ask(prompt: str) -> set[str]:
        found = set()
        for _ in range(8):
            try:
                right = tokens_of(llm.generate(prompt, max_new_tokens=20)) == expected[prompt]
                found.add("right" if right else "wrong")
            except MinisaError as error:
                found.add(str(error))
            found.add("right" if torch.equal(llm.logits(list(b"hello")), logits) else "other logits")
        return found

    with ThreadPoolExecutor(len(PROMPTS)) as threads:
        found = set.union(*threads.map(ask, PROMPTS))
    assert found <= {
        "right",
        "generate: another generation has begun on this model, or a step was interrupted: begin anew",
    }


def test_rows_come_and_go_from_other_threads() -> None:
    llm = llm_of()
    expected = tokens_of(llm.generate("hello", max_new_tokens=90))
    batch = llm.batch()
    kept = batch.add("hello", max_new_tokens=90)

    def come_and_go(_: int) -> None:
        for _ in range(40):
            batch.cancel(batch.add("other", max_new_tokens=5))

    with ThreadPoolExecutor(2) as threads:
        others = [threads.submit(come_and_go, number) for number in range(2)]
        assert tokens_of(batch, kept) == expected
        for other in others:
            other.result()


def test_a_batch_interrupted_in_a_step_does_not_go_on_with_other_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokens of the rows already at work were chosen, and never given out."""
    llm = llm_of()
    batch = llm.batch()
    batch.add("hello")
    next(batch)
    batch.add("other")

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(llm.runner, "prefill", interrupted)
        with pytest.raises(KeyboardInterrupt):
            next(batch)
    with pytest.raises(MinisaError, match="a step was interrupted: begin anew"):
        next(batch)
    assert text_of(llm.generate("hello", max_new_tokens=9)) == text_of(llm_of().generate("hello", max_new_tokens=9))
