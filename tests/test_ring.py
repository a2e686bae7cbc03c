"""The ring that a sliding-window model's cache is, against caches that keep every token and mask what is not seen."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from minisa.cache import WRITTEN_AHEAD
from minisa.costs import SLACK, kv_bytes, prefill_flops, step_cost
from minisa.errors import MinisaError
from minisa.generation.speculate import MAX_GUESSES
from minisa.runners import eager as decode
from minisa.runners.eager import TorchRunner, prefill_chunks
from minisa.sharing import SharingPlan
from tests.engines import DEVICE, text_of, tokens_of
from tests.models import build_model, random_tokens
from tests.rings import CONTEXT, SLOTS, WINDOW, WINDOWED, WINDOWED_PLANS, windowed_cache, windowed_llm


def masked(plan: SharingPlan, ids: Tensor) -> Tensor:
    """Logits [B, T, vocab_size] of the reference in one go, every token kept."""
    batch, length = ids.shape
    cache = windowed_cache(plan, ring=False, batch=batch, max_seq_len=length)
    assert cache.slots == length
    return build_model(WINDOWED, plan, "reference")(ids, torch.arange(length).expand(batch, -1), cache)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("plan", WINDOWED_PLANS)
@pytest.mark.parametrize("length", [SLOTS - 1, SLOTS, SLOTS + 1, 500])
def test_bytes_by_the_formula(length: int, plan: str, dtype: torch.dtype) -> None:
    cache = windowed_cache(WINDOWED_PLANS[plan], batch=3, max_seq_len=length, dtype=dtype)
    assert cache.bytes() == kv_bytes(WINDOWED, WINDOWED_PLANS[plan], length, dtype.itemsize, 3)
    slots = min(length, 8 + 64)
    per_slot = (4 + len(WINDOWED_PLANS[plan].leaders)) * 3 * 2 * 16 * dtype.itemsize
    assert (cache.slots, cache.length, cache.bytes()) == (slots, length, slots * per_slot)
    assert windowed_cache(WINDOWED_PLANS[plan], ring=False, max_seq_len=length).slots == length


@pytest.mark.parametrize("tokens", [1, 5, 32, 100])
@pytest.mark.parametrize("plan", WINDOWED_PLANS)
def test_a_prompt_s_operations_are_those_of_its_tokens_one_by_one(plan: str, tokens: int) -> None:
    """But for the head, which only the last one needs."""
    for config in (WINDOWED, replace(WINDOWED, sliding_window=None)):
        steps = [
            step_cost(config, WINDOWED_PLANS[plan], 1 + i, weight_bytes=0, kv_itemsize=2).flops for i in range(tokens)
        ]
        heads = 2 * (tokens - 1) * config.vocab_size * config.dim
        assert prefill_flops(config, WINDOWED_PLANS[plan], tokens) == sum(steps) - heads


@pytest.mark.parametrize("chunk", [7, SLOTS + 30, CONTEXT], ids=["short chunks", "longer than the ring", "one chunk"])
@pytest.mark.parametrize("plan", WINDOWED_PLANS)
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_chunks_and_steps_across_the_wrap(plan: str, backend: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt in chunks, steps that go round once more, and a chunk after them."""
    ids = random_tokens(WINDOWED, 1, CONTEXT)
    expected = masked(WINDOWED_PLANS[plan], ids)
    monkeypatch.setattr(decode, "PREFILL_CHUNK", chunk)
    model, cache = build_model(WINDOWED, WINDOWED_PLANS[plan], backend), windowed_cache(WINDOWED_PLANS[plan])
    fed = CONTEXT - SLOTS - 7
    hidden = list(prefill_chunks(model, ids[:, :fed], 0, cache))
    found = [model.head(torch.cat(hidden, 1))]
    runner = TorchRunner(model)
    for i in range(fed, fed + SLOTS):
        found.append(runner.decode(ids[:, i], torch.tensor([i]), cache, i + 1)[:, None])
    found.append(next(runner.all_logits(ids[:, fed + SLOTS :], fed + SLOTS, cache))[None])
    assert (torch.cat(found, 1) - expected[:, : sum(part.shape[1] for part in found)]).abs().max() < 1e-4


@pytest.mark.parametrize("plan", WINDOWED_PLANS)
def test_a_few_tokens_at_once_across_the_wrap_by_the_kernels(plan: str) -> None:
    """As guesses come, from slots that are read in the order of their positions."""
    pytest.importorskip("triton", reason='needs pip install "minisa[test]", on Linux')
    ids = random_tokens(WINDOWED, 1, CONTEXT)
    expected = masked(WINDOWED_PLANS[plan], ids)[0].to(DEVICE)
    model = build_model(WINDOWED, WINDOWED_PLANS[plan], "kernels").to(DEVICE)
    runner, cache = TorchRunner(model), windowed_cache(WINDOWED_PLANS[plan], device=DEVICE)
    ids, fed = ids.to(DEVICE), SLOTS - 9
    runner.prefill(ids[:, :fed], 0, cache)
    for n_tokens in (3, 8, 5):
        found = runner.verify(ids[:, fed : fed + n_tokens], fed, cache)
        assert (found - expected[fed : fed + n_tokens]).abs().max() < 1e-4
        fed += n_tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("plan", WINDOWED_PLANS)
def test_ragged_rows_and_narrow_dtypes(plan: str, dtype: torch.dtype) -> None:
    """Rows that have gone round, rows that do so now, and rows that have not, in one batch."""
    ids, prompts = random_tokens(WINDOWED, 4, CONTEXT), (1, SLOTS - 5, SLOTS + 3, 3 * SLOTS - 20)
    model = build_model(WINDOWED, WINDOWED_PLANS[plan])
    runner = TorchRunner(model)
    ring, whole = (windowed_cache(WINDOWED_PLANS[plan], ring=ring, batch=4, dtype=dtype) for ring in (True, False))
    bits = torch.uint8 if dtype.itemsize == 1 else dtype
    for cache in (ring, whole):
        cache.keys.view(bits).fill_(9)  # what an earlier text may have left
        cache.values.view(bits).fill_(9)
        for row, length in enumerate(prompts):
            runner.prefill(ids[row : row + 1, :length], 0, cache.view(rows=slice(row, row + 1)))
    positions = torch.tensor(prompts)
    for _ in range(20):
        fed, in_use = ids[range(4), positions], int(positions.max()) + 1
        found, expected = (runner.decode(fed, positions, cache, in_use) for cache in (ring, whole))
        assert (found - expected).norm() / expected.norm() < (1e-5 if dtype == torch.float32 else 5e-3)
        positions = positions + 1


def test_positions_end_where_the_context_does() -> None:
    cache = windowed_cache(WINDOWED_PLANS["none"])
    assert cache.view(CONTEXT).slots == SLOTS
    assert (cache.view(SLOTS).slots, cache.view(SLOTS).wraps) == (SLOTS, False)
    with pytest.raises(MinisaError, match=f"{CONTEXT + 1} tokens do not fit a cache of {CONTEXT}"):
        cache.view(CONTEXT + 1)


OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 0.8, "seed": 5, "top_k": 40, "repetition_penalty": 1.3},
    "guessing": {"speculate": True, "repetition_penalty": 0.01},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("prompt", ["x", "abc" * (SLOTS // 2)])
def test_the_same_text_to_the_context_s_end(prompt: str, options: dict[str, Any]) -> None:
    expected = list(windowed_llm(ring=False).generate(prompt, **options | {"speculate": False}))
    found = list(windowed_llm().generate(prompt, **options))
    assert tokens_of(found) == tokens_of(expected) and text_of(found) == text_of(expected)
    assert found[-1].finish_reason == "context"
    assert len(found) == CONTEXT - len(prompt) + 1
    with pytest.raises(MinisaError, match=f"{CONTEXT + 1} tokens long, the context {CONTEXT}"):
        windowed_llm().generate("y" * (CONTEXT + 1))


def test_rows_of_a_batch() -> None:
    prompts = ["x", "y" * SLOTS, "z" * (CONTEXT - 10), "xyz" * 20]
    found = list(windowed_llm().generate(prompts, max_new_tokens=SLOTS))
    for row, prompt in enumerate(prompts):
        assert tokens_of(found, row) == tokens_of(windowed_llm(ring=False).generate(prompt, max_new_tokens=SLOTS))


@pytest.mark.parametrize("seed", range(2))
def test_a_dialog_of_turns_that_take_back_and_break_off(seed: int) -> None:
    """Every turn begins with some of the text so far, a little less than all or far less, goes on with new tokens, and
    may be left before its end; after each the answer is that of a model without a ring and without a past."""
    draw = random.Random(seed)
    llm, text_so_far, reused = windowed_llm(), [1], 0
    beginning = [draw.randrange(256) for _ in range(SLOTS + 40)]
    prefix = llm.prefix(beginning)
    for _ in range(30):
        kept = len(text_so_far) - draw.choice([0, 0, 1, 9, 30, WINDOW, SLACK, SLOTS + 9])
        if draw.random() < 0.15:
            text_so_far, kept = beginning, draw.choice([len(beginning), len(beginning) - 30, 50])
        prompt = text_so_far[: max(kept, 0)] + [draw.randrange(256) for _ in range(draw.choice([1, 2, 5, 40, 120]))]
        prompt = prompt[: CONTEXT - 30]
        options: dict[str, Any] = {"max_new_tokens": draw.choice([1, 9, 30]), "speculate": draw.random() < 0.3}
        chunks = llm.generate(prompt, prefix=prefix if draw.random() < 0.5 else None, **options)
        taken = draw.choice([1, 5, 30])
        answer = []
        for chunk in chunks:
            answer.append(chunk.token)
            if chunk.stats is not None:
                reused += chunk.stats.reused_tokens > SLOTS
            if len(answer) == taken:
                break
        chunks.close()  # type: ignore[attr-defined]
        fresh = windowed_llm(ring=False).generate(prompt, max_new_tokens=len(answer))
        assert answer == tokens_of(fresh)
        text_so_far = prompt + answer
    assert reused > 3


def test_a_prompt_broken_off_leaves_nothing_that_a_ring_has_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while a prompt is fed: the tokens before it, which the cache held, may have been written over."""
    llm, prefill = windowed_llm(), TorchRunner.prefill
    tail = list(range(150))
    beginning = [7] * 60
    list(llm.generate(beginning, max_new_tokens=2))

    def broken_off(self: TorchRunner, *inputs: Any) -> Tensor:
        prefill(self, *inputs)
        raise KeyboardInterrupt

    monkeypatch.setattr(TorchRunner, "prefill", broken_off)
    with pytest.raises(KeyboardInterrupt):
        next(llm.generate(beginning + tail))
    monkeypatch.undo()
    found = tokens_of(llm.generate([*beginning, 1], max_new_tokens=5))
    assert found == tokens_of(windowed_llm(ring=False).generate([*beginning, 1], max_new_tokens=5))


@pytest.mark.parametrize("cut", [0, 10, 60])
def test_a_prefix_longer_than_the_ring(cut: int) -> None:
    """Taken over whole, or but for a few tokens; where more of it is left out, too much is lost to begin there."""
    llm = windowed_llm()
    beginning = [i * 7 % 256 for i in range(SLOTS + 60)]
    prefix = llm.prefix(beginning)
    assert prefix.cache.bytes() == kv_bytes(WINDOWED, llm.plan, len(beginning), 4)
    assert prefix.cache.slots == SLOTS
    prompts = [[*beginning[: len(beginning) - cut], *range(tail)] for tail in (1, 64)]
    found = list(llm.generate(prompts, max_new_tokens=12, prefix=prefix))
    for row, prompt in enumerate(prompts):
        assert tokens_of(found, row) == tokens_of(windowed_llm(ring=False).generate(prompt, max_new_tokens=12))
        reused = len(beginning) - cut if cut <= SLACK - WRITTEN_AHEAD and len(prompt) >= len(beginning) else 0
        assert next(c.stats.reused_tokens for c in found if c.row == row and c.stats) == reused


def test_the_slack_is_enough() -> None:
    """Of a chunk of the C++ step the first token sees its window, which the last has not written over; nor have
    guesses, or steps that ran ahead, what is left when a turn takes back what it may."""
    from minisa.runners.graphs import WARM_UP
    from minisa.runners.native.runner import CHUNK

    assert CHUNK <= SLACK + 2
    assert WRITTEN_AHEAD > MAX_GUESSES + WARM_UP
