"""Refit: ridge regression against the plain model's stream."""

from __future__ import annotations

import pytest
import torch

from minisa.sharing import SharingPlan
from minisa.study.loss import final_hidden
from minisa.study.refit import LAMBDAS, refit
from minisa.study.walk import Walk, replace, share
from tests.models import N_LAYERS, PLANS, SIX_LAYERS, build_model, random_tokens

pytestmark = pytest.mark.usefixtures("one_thread")

PLAN = SharingPlan.following(N_LAYERS, {3: 2, 5: 4}, {5: [1, 0, 3, 2]})


def test_one_follower_is_refitted_by_the_formula() -> None:
    """Against the normal equations written out, for the λ that was chosen."""
    plain = build_model(SIX_LAYERS, PLANS["none"])
    text, held_out = random_tokens(SIX_LAYERS, 40, 32), random_tokens(SIX_LAYERS, 10, 32).flip(0)
    plan = SharingPlan.following(N_LAYERS, {2: 1})
    found, [correction] = refit(plain, plan, text, held_out, batch=7)
    assert correction.name == "layers.2.attention.wo.weight" == next(iter(found))
    assert correction.after < correction.before
    assert correction.ridge in LAMBDAS
    walk = Walk(plain)
    states = [walk.embed(text)]
    states += list(walk.onward(states, 0))
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


def test_it_brings_the_stream_nearer_on_text_it_has_not_seen() -> None:
    plain = build_model(SIX_LAYERS, PLANS["none"])
    generator = torch.Generator().manual_seed(1)
    text, held_out, unseen = (torch.randint(256, (n, 48), generator=generator) for n in (60, 20, 20))
    found, corrections = refit(plain, PLAN, text, held_out)
    assert [correction.name for correction in corrections] == [f"layers.{i}.attention.wo.weight" for i in (3, 5)]
    wanted = final_hidden(plain, unseen)
    shared = share(plain, PLAN)
    before = (final_hidden(shared, unseen) - wanted).norm()
    assert (final_hidden(replace(shared, found), unseen) - wanted).norm() < 0.95 * before
    assert torch.equal(final_hidden(plain, unseen), wanted)  # whose weights are as they were


def test_what_only_fits_the_noise_is_left_alone() -> None:
    """Two windows of text against other text held out: no λ helps there, so nothing is replaced."""
    plain = build_model(SIX_LAYERS, PLANS["none"])
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(0, 3, (1, 4), generator=generator)
    held_out = torch.randint(100, 256, (12, 4), generator=generator)
    found, [correction] = refit(plain, SharingPlan.following(N_LAYERS, {2: 1}), text, held_out)
    assert found == {} and correction.after == correction.before and correction.ridge == float("inf")
