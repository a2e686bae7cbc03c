"""Refit: ridge regression against the plain model's stream."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, product

import pytest
import torch

from minisa.sharing import SharingPlan
from minisa.study.calibrate import attention_weights
from minisa.study.head_maps import Outputs, descend
from minisa.study.loss import final_hidden
from minisa.study.refit import LAMBDAS, refit
from minisa.study.walk import Walk, replace, share
from tests.test_model import CONFIG, N_LAYERS, PLANS, build, tokens_of

PLAN = SharingPlan.following(N_LAYERS, {3: 2, 5: 4}, {5: [1, 0, 3, 2]})


def test_one_follower_is_refitted_by_the_formula() -> None:
    """Against the normal equations written out, for the λ that was chosen."""
    plain = build(CONFIG, PLANS["none"])
    text, held_out = tokens_of(CONFIG, 40, 32), tokens_of(CONFIG, 10, 32).flip(0)
    plan = SharingPlan.following(N_LAYERS, {2: 1})
    refitted = refit(plain, plan, text, held_out, batch=7)
    found, [correction] = refitted.weights, refitted.corrections
    assert refitted.plan == plan
    assert correction.name == "layers.2.attention.wo.weight" == next(iter(found))
    assert correction.after < correction.before
    assert correction.ridge in LAMBDAS
    walk = Walk(plain)
    states = [walk.embed(text)]
    states += walk.onward(states, 0, keep=True)
    own = walk.mixed(2, states[2], walk.queries(2, states[2])).flatten(0, 1).double()
    theirs = walk.mixed(2, states[2], walk.queries(1, states[1])).flatten(0, 1).double()
    weight = plain.layers[2].attention.wo.weight.double()
    rest = (own - theirs) @ weight.T
    share_of = 1 / (states[2].flatten(0, 1) + own.float() @ plain.layers[2].attention.wo.weight.T).norm(dim=-1)
    theirs, rest = theirs * share_of[:, None], rest * share_of[:, None]
    gram = theirs.T @ theirs
    ridge = correction.ridge * gram.diagonal().mean() * torch.eye(len(gram))
    expected = weight + torch.linalg.solve(gram + ridge, theirs.T @ rest).T
    assert torch.allclose(found[correction.name].double(), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("which", "names"),
    [
        ("followers", ["3.attention.wo", "5.attention.wo"]),
        ("wo", ["3.attention.wo", "4.attention.wo", "5.attention.wo"]),
        ("all", [f"{i}.{half}" for i in (3, 4, 5) for half in ("attention.wo", "feed_forward.w2")]),
    ],
)
def test_it_brings_the_stream_nearer_on_text_it_has_not_seen(which: str, names: list[str]) -> None:
    plain = build(CONFIG, PLANS["none"])
    generator = torch.Generator().manual_seed(1)
    text, held_out, unseen = (torch.randint(256, (n, 48), generator=generator) for n in (60, 20, 20))
    refitted = refit(plain, PLAN, text, held_out, which=which)
    found, corrections = refitted.weights, refitted.corrections
    assert [correction.name for correction in corrections] == [f"layers.{name}.weight" for name in names]
    wanted = final_hidden(plain, unseen)
    shared = share(plain, PLAN)
    before = (final_hidden(shared, unseen) - wanted).norm()
    assert (final_hidden(replace(shared, found), unseen) - wanted).norm() < 0.95 * before
    assert torch.equal(final_hidden(plain, unseen), wanted)  # whose weights are as they were


def test_what_only_fits_the_noise_is_left_alone() -> None:
    """Two windows of text against other text held out: no λ helps there, so nothing is replaced."""
    plain = build(CONFIG, PLANS["none"])
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(0, 3, (1, 4), generator=generator)
    held_out = torch.randint(100, 256, (12, 4), generator=generator)
    refitted = refit(plain, SharingPlan.following(N_LAYERS, {2: 1}), text, held_out)
    [correction] = refitted.corrections
    assert refitted.weights == {} and correction.after == correction.before and correction.ridge == float("inf")


def test_head_maps_leave_the_least_of_all_maps() -> None:
    """By trying them all, in so many words: the blocks a map picks, under wo as it is and under least squares."""
    plain = build(CONFIG, PLANS["none"])
    text = tokens_of(CONFIG, 30, 32)
    walk = Walk(plain)
    states = [walk.embed(text)]
    states += walk.onward(states, 0, keep=True)
    queries, x = walk.queries(1, states[1]), states[3]
    wanted = walk.add_attention(3, x, walk.mixed(3, x, walk.queries(3, x)))
    rows = 1 / wanted.norm(dim=-1, keepdim=True).flatten(0, 1)
    goal = ((wanted - x).flatten(0, 1) * rows).double()
    weights, kv = attention_weights(queries), walk.values(3, x)
    blocks = {
        (j, h): ((weights[:, j] @ kv[:, h // 2]).flatten(0, 1) * rows).double() for j in range(4) for h in range(4)
    }
    wo = plain.layers[3].attention.wo.weight.double()

    def left(heads: Sequence[int], solution: torch.Tensor | None) -> float:
        features = torch.cat([blocks[j, h] for h, j in enumerate(heads)], -1)
        if solution is None:
            solution = torch.linalg.lstsq(features, goal, driver="gelsd").solution
        return (goal - features @ solution).square().sum().item() / goal.square().sum().item()

    outputs = Outputs(walk, 3, [(x, wanted, queries)])
    for heads in ((0, 1, 2, 3), (2, 2, 0, 3)):
        assert outputs.left_as_it_is()(list(heads)) == pytest.approx(left(heads, wo.T), rel=1e-3)
        assert outputs.left_fitted()(list(heads)) == pytest.approx(left(heads, None), abs=0.02)
    found, lowest = descend(outputs.left_as_it_is(), (0, 1, 2, 3))
    assert lowest == pytest.approx(left(found, wo.T), rel=1e-3)
    assert lowest <= min(left(heads, wo.T) for heads in product(range(4), repeat=4)) + 0.02
    found, lowest = descend(outputs.left_fitted(), (0, 0, 0, 0))
    pairs = list(combinations(range(4), 2))
    assert left(found, None) <= min(left((*one, *other), None) for one, other in product(pairs, pairs)) + 0.02


def test_maps_alone_are_chosen_from_what_the_followers_see() -> None:
    """No matrix is replaced, and the stream comes nearer than by the maps it had."""
    plain = build(CONFIG, PLANS["none"])
    text, unseen = tokens_of(CONFIG, 30, 32), tokens_of(CONFIG, 20, 31)
    refitted = refit(plain, PLAN, text, text[:1], which="none", heads=True)
    assert (refitted.weights, refitted.corrections) == ({}, [])
    wanted = final_hidden(plain, unseen)
    before, after = ((final_hidden(share(plain, plan), unseen) - wanted).norm() for plan in (PLAN, refitted.plan))
    assert after < before


def test_maps_chosen_for_matrices_to_come() -> None:
    """The matrix of the first follower leaves less of the difference with the map that was chosen for it."""
    plain = build(CONFIG, PLANS["none"])
    generator = torch.Generator().manual_seed(1)
    text, held_out = (torch.randint(256, (n, 48), generator=generator) for n in (60, 20))
    plan = SharingPlan.following(N_LAYERS, {5: 2}, {5: [0, 0, 0, 0]})
    as_it_was, chosen = (refit(plain, plan, text, held_out, heads=heads) for heads in (False, True))
    assert as_it_was.plan == plan != chosen.plan
    assert chosen.corrections[0].after < as_it_was.corrections[0].after
