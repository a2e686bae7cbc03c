"""Samplers against their definitions, and the statistics of the draw."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from minisa.errors import MinisaError
from minisa.generation import sampling
from minisa.generation.options import Options, Sampling
from minisa.generation.sampling import (
    NO_TOKEN,
    NUCLEUS,
    Chooser,
    choose,
    draw,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    none_refused,
    penalize,
    uniforms_of,
)

PROBABILITIES = torch.tensor([[0.05, 0.5, 0.25, 0.15, 0.05]])
LOGITS = PROBABILITIES.log() + 3.0  # logits know no absolute level


def kept(filtered: torch.Tensor) -> list[int]:
    return filtered.isfinite()[0].nonzero().flatten().tolist()


def test_filters_keep_what_their_definitions_say() -> None:
    assert kept(keep_top_k(LOGITS, 2)) == [1, 2]
    assert kept(keep_top_k(LOGITS, 99)) == [0, 1, 2, 3, 4]
    assert kept(keep_top_p(LOGITS, 0.5)) == [1]
    assert kept(keep_top_p(LOGITS, 0.51)) == [1, 2]
    assert kept(keep_top_p(LOGITS, 0.8)) == [1, 2, 3]
    assert kept(keep_top_p(LOGITS, 0.94)) == [0, 1, 2, 3, 4]  # two are alike
    for tiny in (1e-9, 1e-50):
        assert kept(keep_top_p(LOGITS, tiny)) == [1]  # the likeliest always stays
    assert kept(keep_min_p(LOGITS, 0.25)) == [1, 2, 3]
    assert kept(keep_min_p(LOGITS, 1.0)) == [1]


def test_top_p_of_a_large_vocabulary() -> None:
    """Rows of which a few tokens, some thousands or nearly all are kept, each as it is alone."""
    logits = torch.randn(3, 6 * NUCLEUS, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [[9.0], [2.0], [0.1]]
    )
    found = keep_top_p(logits, 0.9)
    for row, filtered in zip(logits, found, strict=True):
        assert torch.equal(keep_top_p(row[None], 0.9)[0], filtered)
        probabilities = row.double().softmax(-1)
        chosen = probabilities[filtered.isfinite()]
        assert probabilities[filtered.isinf()].max() < chosen.min()
        assert chosen.sum() - chosen.min() < 0.9 <= chosen.sum()
    counts = found.isfinite().sum(-1).tolist()
    assert counts[0] < 100 and NUCLEUS < counts[1] < counts[2]


def test_penalty_moves_seen_tokens_down_whatever_their_sign() -> None:
    seen = torch.tensor([[True, True, False]])
    assert penalize(torch.tensor([[2.0, -2.0, 2.0]]), seen, 2.0).tolist() == [[1.0, -4.0, 2.0]]


def test_draw_is_the_inverse_of_the_running_sum() -> None:
    """Never a token of probability 0, at either end, even for the largest number below 1."""
    p = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]])
    largest = 1 - 2**-24
    drawn = [draw(p, torch.tensor([u])).item() for u in (0.0, 0.2499, 0.2501, 0.9, largest)]
    assert drawn == [1, 1, 3, 3, 3]


def test_a_gpus_sums_lead_to_no_refused_token() -> None:
    p = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0], [0.0, 0.25, 0.0, 0.75, 0.0]])
    assert none_refused(torch.tensor([1, 2]), p).tolist() == [1, 3]


@pytest.mark.skipif(sys.platform != "linux", reason="PyTorch's threads are libgomp's on Linux")
def test_a_choice_leaves_the_other_cores_to_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's threads would spin there while the next step's begin."""
    seen, threads = [], torch.get_num_threads()
    monkeypatch.setattr(sampling, "choose", lambda *given: seen.append(torch.get_num_threads()) or choose(*given))
    torch.set_num_threads(3)
    try:
        Chooser.greedy(1)(LOGITS, torch.tensor([0]))
        assert (seen, torch.get_num_threads()) == ([1], 3)
    finally:
        torch.set_num_threads(threads)


def test_frequencies_follow_the_distribution() -> None:
    uniforms = uniforms_of(7, 20_000)
    drawn = choose(Sampling(temperature=1.0), LOGITS.expand(20_000, -1), uniforms)
    frequencies = drawn.bincount(minlength=5) / 20_000
    assert (frequencies - PROBABILITIES[0]).abs().max() < 0.012  # about three standard deviations
    sharp = choose(Sampling(temperature=0.5), LOGITS.expand(20_000, -1), uniforms).bincount(minlength=5) / 20_000
    squared = PROBABILITIES[0] ** 2 / (PROBABILITIES[0] ** 2).sum()
    assert (sharp - squared).abs().max() < 0.012


def test_filters_are_composed_after_the_temperature() -> None:
    """At temperature 0.5 token 1 holds 0.71 of the mass, so top_p 0.6 leaves it alone; at 1 it would not."""
    cold, warm = (choose(Sampling(temperature=t, top_p=0.6), LOGITS, torch.tensor([0.9])).item() for t in (0.5, 1.0))
    assert (cold, warm) == (1, 2)


def test_a_seed_fixes_the_numbers_of_its_row() -> None:
    assert torch.equal(uniforms_of(3, 8), uniforms_of(3, 8))
    assert not torch.equal(uniforms_of(3, 8), uniforms_of(4, 8))
    assert not torch.equal(uniforms_of(None, 8), uniforms_of(None, 8))
    assert Options(seed=3).seeds(2) == Options(seed=[3, 3]).seeds(2) == [3, 3]
    with pytest.raises(MinisaError, match="3 seeds for 2 prompts"):
        Options(seed=[1, 2, 3]).seeds(2)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 1e-40),
        ("temperature", 1e300),
        ("temperature", "1"),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", -1),
        ("top_k", 2.5),
        ("top_k", True),
        ("top_p", 0.0),
        ("top_p", 1e-50),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", 1e-300),
        ("seed", 1 << 64),
        ("seed", 1.5),
        ("seed", "1"),
        ("seed", [1, 2.5]),
    ],
)
def test_values_out_of_range_are_named(option: str, value: Any) -> None:
    with pytest.raises(MinisaError, match=f"^{option} is .*: expected"):
        Options(**{option: value})


EXTREMES = {"temperature": (1e-4, 1e4), "top_p": (1e-6, 1), "min_p": (1e-320, 1), "repetition_penalty": (1e-9, 1e9)}


@pytest.mark.parametrize(("option", "value"), [(option, value) for option in EXTREMES for value in EXTREMES[option]])
def test_the_ends_of_the_ranges_choose_from_the_vocabulary(option: str, value: float) -> None:
    logits, uniforms = torch.randn(64, 300, generator=torch.Generator().manual_seed(0)) * 30, torch.rand(64)
    tokens = choose(Sampling(**({"temperature": 1.0} | {option: value})), logits, uniforms, logits > 0)
    assert ((tokens >= 0) & (tokens < 300)).all()


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "options", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 2, "top_p": 0.5, "min_p": 0.1}]
)
def test_no_token_where_the_logits_are_not_finite(options: dict[str, float], wrong: float) -> None:
    logits = LOGITS.repeat(2, 1)
    logits[0, 3] = wrong
    logits[1, 3] = float("-inf")  # one that is merely refused
    assert choose(Sampling(**options), logits, torch.tensor([0.3, 0.3])).tolist() == [NO_TOKEN, 1]


@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 3.0}, {"temperature": 1.0, "repetition_penalty": 3.0}])
def test_guesses_confirmed_at_once_are_those_confirmed_one_by_one(options: dict[str, Any]) -> None:
    """As a GPU does it and as a CPU does it: the same tokens, and the same text remembered."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(4, 12, generator=generator)

    def chooser() -> Chooser:
        fresh = Chooser.idle(Sampling(**options), 1, 20, 12, torch.device("cpu"))
        fresh.begin([3, 4], 5)
        return fresh

    right: list[int] = []
    for i in range(4):  # what would be right to guess, token by token
        right.append(chooser().confirm(logits[: i + 1], right, 7)[-1])
    for wrong_at in range(4):
        guesses = [token if i != wrong_at else (token + 1) % 12 for i, token in enumerate(right[:3])]
        one_by_one, at_once = chooser(), chooser()
        for found in (one_by_one.confirm_one_by_one(logits, guesses, 7), at_once.confirm_at_once(logits, guesses, 7)):
            assert found == right[: wrong_at + 1]
        for seen in (one_by_one.seen, at_once.seen):
            assert seen is None or seen[0].nonzero().flatten().tolist() == sorted({3, 4, *right[: wrong_at + 1]})
