"""Walking layer by layer, head maps and the judge, against the slow way of having the same."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import pytest
import torch
import torch.nn.functional as F

from minisa.model import Transformer
from minisa.sharing import SharingPlan
from minisa.study.calibrate import best_map, pair_errors
from minisa.study.head_maps import compare_maps, descend, remap
from minisa.study.judge import Judge, first_difference
from minisa.study.loss import final_hidden
from minisa.study.walk import Streams, Walk, attention_weights, share
from tests.models import N_LAYERS, PLANS, SIX_LAYERS, build_model, in_one_go, random_tokens
from tests.tiny import tiny_config

pytestmark = pytest.mark.usefixtures("one_thread")

PLAN = SharingPlan.following(N_LAYERS, {3: 2, 5: 4}, {5: [1, 0, 3, 2]})
WINDOWED = tiny_config(n_layers=N_LAYERS, sliding_window=7)


def all_states(walk: Walk, tokens: torch.Tensor) -> list[torch.Tensor]:
    """x before each layer and after the last."""
    first = walk.embed(tokens)
    return [first, *walk.onward([first], 0)]


@pytest.mark.parametrize("config", [SIX_LAYERS, WINDOWED], ids=["full", "window"])
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_a_walk_is_the_model_whichever_layer_it_goes_on_from(plan: SharingPlan, config) -> None:
    model = share(build_model(config, PLANS["none"]), plan)
    tokens = random_tokens(config, 2, 20)
    walk = Walk(model)
    states = all_states(walk, tokens)
    assert len(states) == N_LAYERS + 1
    expected = final_hidden(build_model(config, plan), tokens)
    assert torch.allclose(model.norm(states[-1]), expected, atol=1e-4)
    for start in range(1, N_LAYERS):
        assert torch.allclose(list(walk.onward(states[: start + 1], start))[-1], states[-1], atol=1e-5)


def test_sharing_copies_no_weight() -> None:
    plain = build_model(SIX_LAYERS, PLANS["none"])
    shared = share(plain, PLANS["span"])
    assert shared.plan == PLANS["span"]
    assert shared.layers[3].attention.wo.weight.data_ptr() == plain.layers[3].attention.wo.weight.data_ptr()
    assert not hasattr(shared.layers[3].attention, "wq")


def heads_added(model: Transformer, i: int, x: torch.Tensor, weights: torch.Tensor, h: int, j: int) -> torch.Tensor:
    """What head h of layer i adds to x [T, dim] under weights[j], in so many words."""
    layer, d = model.layers[i], SIX_LAYERS.head_dim
    v = layer.attention.wv(layer.attention_norm(x))
    kv = h // SIX_LAYERS.group_size
    return weights[j] @ v[:, kv * d : (kv + 1) * d] @ layer.attention.wo.weight[:, h * d : (h + 1) * d].T


def weights_of(model: Transformer, i: int, x: torch.Tensor) -> torch.Tensor:
    q, k, _ = Walk(model).queries(i, x[None])
    found = []
    for h in range(SIX_LAYERS.n_heads):
        scores = q[0, h] @ k[0, h // SIX_LAYERS.group_size].T / SIX_LAYERS.head_dim**0.5
        found.append((scores + torch.full_like(scores, -torch.inf).triu(1)).softmax(-1))
    return torch.stack(found)


def test_errors_of_pairs_are_those_of_the_formula() -> None:
    model = build_model(SIX_LAYERS, PLANS["none"])
    tokens = random_tokens(SIX_LAYERS, 2, 12)
    errors = pair_errors(model, tokens)
    walk = Walk(model)
    states = all_states(walk, tokens)
    for leader, f in ((0, 1), (1, 4)):
        for j, h in ((0, 0), (3, 1), (2, 3)):
            error, scale = 0.0, 0.0
            for row in range(2):
                x = states[f][row]
                own, theirs = weights_of(model, f, x), weights_of(model, leader, states[leader][row])
                mine = heads_added(model, f, x, own, h, h)
                error += (heads_added(model, f, x, theirs, h, j) - mine).square().sum().item()
                scale += sum(heads_added(model, f, x, own, g, g) for g in range(4)).square().sum().item()
            assert errors[leader, f, j, h].item() == pytest.approx(error / scale, rel=1e-3)
    assert errors[2, 2].isinf().all() and errors[3, 2].isinf().all()


def test_a_permuted_copy_of_a_layer_is_recognized() -> None:
    """Layer 3 asks what layer 2 asks, its key groups exchanged: the best map exchanges them back, at no cost."""
    model = build_model(SIX_LAYERS, PLANS["none"])
    second, third = model.layers[2], model.layers[3]
    for matrix in (second.attention.wo, second.feed_forward.w2):  # layer 2 adds nothing: layer 3 sees the same x
        matrix.weight.zero_()
    third.attention_norm.weight.copy_(second.attention_norm.weight)
    third.attention.wq.weight.copy_(second.attention.wq.weight.roll(2 * SIX_LAYERS.head_dim, 0))
    third.attention.wk.weight.copy_(second.attention.wk.weight.roll(SIX_LAYERS.head_dim, 0))
    errors = pair_errors(model, random_tokens(SIX_LAYERS, 2, 16))[2, 3]
    assert best_map(errors) == (2, 3, 0, 1)
    assert errors.min(0).values.sum() < 1e-8 < errors.diagonal().sum()


@pytest.mark.parametrize("every", [1, 3])
def test_a_judge_measures_the_divergence_of_predictions(every: int) -> None:
    plain = build_model(SIX_LAYERS, PLANS["none"])
    tokens = random_tokens(SIX_LAYERS, 3, 18)
    judge = Judge(plain, tokens, every=every)
    wanted = in_one_go(plain, tokens)[:, every - 1 :: every].log_softmax(-1)

    def expected(plan: SharingPlan) -> float:
        found = in_one_go(share(plain, plan), tokens)[:, every - 1 :: every].log_softmax(-1)
        return F.kl_div(found, wanted, log_target=True, reduction="none").sum(-1).mean().item()

    assert judge.divergence(PLANS["none"]) == pytest.approx(0, abs=1e-5)
    for base in ("none", "last", "interleaved", "head maps"):
        judge.rebase(PLANS[base])
        for plan in PLANS.values():
            assert judge.divergence(plan) == pytest.approx(expected(plan), rel=1e-3, abs=1e-5)


def test_where_plans_part() -> None:
    one = SharingPlan.following(6, {3: 1, 5: 4})
    assert first_difference(one, SharingPlan.following(6, {3: 1})) == 5
    assert first_difference(one, SharingPlan.following(6, {3: 2, 5: 4})) == 3
    assert first_difference(one, SharingPlan.following(6, {3: 1, 5: 4}, {3: [1, 0, 0, 0]})) == 3
    assert first_difference(one, one) == 6


def test_head_maps_leave_the_least_of_all_maps() -> None:
    """By trying them all, in so many words: the blocks a map picks."""
    plain = build_model(SIX_LAYERS, PLANS["none"])
    text = random_tokens(SIX_LAYERS, 30, 32)
    walk = Walk(plain)
    states = all_states(walk, text)
    queries, x = walk.queries(1, states[1]), states[3]
    wanted = walk.add_attention(3, x, walk.queries(3, x))
    rows = 1 / wanted.norm(dim=-1, keepdim=True).flatten(0, 1)
    goal = ((wanted - x).flatten(0, 1) * rows).double()
    weights, kv = attention_weights(queries), walk.values(3, x)
    blocks = {
        (j, h): ((weights[:, j] @ kv[:, h // 2]).flatten(0, 1) * rows).double() for j in range(4) for h in range(4)
    }
    wo = plain.layers[3].attention.wo.weight.double()

    def left(heads: Sequence[int]) -> float:
        features = torch.cat([blocks[j, h] for h, j in enumerate(heads)], -1)
        return (goal - features @ wo.T).square().sum().item() / goal.square().sum().item()

    compared = compare_maps(walk, 3, [Streams(wanted, x, queries)])
    for heads in ((0, 1, 2, 3), (2, 2, 0, 3)):
        assert compared(list(heads)) == pytest.approx(left(heads), rel=1e-3)
    found, lowest = descend(compared, (0, 1, 2, 3))
    assert lowest == pytest.approx(left(found), rel=1e-3)
    assert lowest <= min(left(heads) for heads in product(range(4), repeat=4)) + 0.02


def test_maps_are_made_again_from_what_the_followers_see() -> None:
    """The stream comes nearer than by the maps it had."""
    plain = build_model(SIX_LAYERS, PLANS["none"])
    text, unseen = random_tokens(SIX_LAYERS, 30, 32), random_tokens(SIX_LAYERS, 20, 31)
    found = remap(plain, PLAN, text, batch=4)
    assert found.sources == PLAN.sources and found != PLAN
    wanted = final_hidden(plain, unseen)
    before, after = ((final_hidden(share(plain, plan), unseen) - wanted).norm() for plan in (PLAN, found))
    assert after < before
