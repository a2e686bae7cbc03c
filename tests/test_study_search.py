"""The search for a plan: what it finds, and that it goes on where it was."""

from __future__ import annotations

import time
from typing import Any

import pytest

from minisa.errors import MinisaError
from minisa.model import Transformer
from minisa.sharing import SharingPlan
from minisa.study.judge import Judge
from minisa.study.search import Findings, Search
from tests.models import N_LAYERS, PLANS, SIX_LAYERS, build_model, random_tokens

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENS = random_tokens(SIX_LAYERS, 12, 24)


def twins() -> Transformer:
    """Layers 3 and 5 attend like 2 and 4, heads in another order: the plan to be found, and it costs next to nothing.

    What layers 2 and 4 add goes to dimensions that no attention here looks at, but for the norm.
    """
    model = build_model(SIX_LAYERS, PLANS["none"])
    for leader, follower in ((2, 3), (4, 5)):
        one, other = model.layers[leader], model.layers[follower]
        for matrix in (one.attention.wo, one.feed_forward.w2):
            matrix.weight[8:] = 0
        one.attention_norm.weight[:8] = 0
        other.attention_norm.weight.copy_(one.attention_norm.weight)
        other.attention.wq.weight.copy_(one.attention.wq.weight.roll(2 * SIX_LAYERS.head_dim, 0))
        other.attention.wk.weight.copy_(one.attention.wk.weight.roll(SIX_LAYERS.head_dim, 0))
    return model


def search(model: Transformer, findings: Findings, seconds: float = 60.0, **options: Any) -> Search:
    return Search(model, TOKENS[:6], TOKENS[6:], findings, deadline=time.monotonic() + seconds, **options)


def test_it_finds_the_layers_that_attend_alike() -> None:
    searching = search(twins(), Findings())
    *_, found = searching.run(2)
    assert str(found.plan) == "2:3,4:5"
    assert searching.mapped(SharingPlan.parse("2:3,4:5", N_LAYERS)) == found  # head maps alone
    assert found.plan.head_maps[3] == found.plan.head_maps[5] == (2, 3, 0, 1)
    assert found.divergence < 0.01


def test_points_are_what_the_judge_measures_and_exchanges_never_hurt() -> None:
    model, findings, lines = build_model(SIX_LAYERS, PLANS["none"]), Findings(), []
    hasty = search(model, Findings(), seconds=-1).run(3)
    points = search(model, findings, report=lines.append).run(3)
    assert [len(point.plan.followers) for point in points] == [1, 2, 3]
    assert points[-1].divergence <= hasty[-1].divergence
    assert any("exchanged" in line for line in lines)
    judge = Judge(model, TOKENS[6:])
    for point in points:
        assert judge.divergence(point.plan) == pytest.approx(point.divergence, rel=1e-3)


def test_broken_off_it_goes_on_and_finds_the_same() -> None:
    model = build_model(SIX_LAYERS, PLANS["none"])
    whole = search(model, Findings()).run(3)
    findings, countdown = Findings(), iter(range(9))

    def interrupt() -> None:
        if next(countdown, None) is None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search(model, findings, saved=interrupt).run(3)
    measured = len(findings.measured)
    assert measured > 5
    saves = []
    assert search(model, findings, saved=lambda: saves.append(1)).run(3) == whole
    saves.clear()
    assert search(model, findings, saved=lambda: saves.append(1), seconds=-1).run(3) == whole
    assert not saves  # nothing was measured twice, so a search without time replays the one before it


def test_so_many_cannot_follow() -> None:
    with pytest.raises(MinisaError, match="--followers is 6: expected 1 to 5, layer 0 must lead"):
        search(build_model(SIX_LAYERS, PLANS["none"]), Findings()).run(N_LAYERS)
