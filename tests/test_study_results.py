"""What eval makes of its scores: standard errors and paired differences; and progress."""

from __future__ import annotations

import math

import pytest
import torch

from minisa.study import progress
from minisa.study.compare import Estimate, paired_difference, ratio
from minisa.study.progress import Progress, duration


def test_the_standard_error_of_an_accuracy() -> None:
    hits = [1.0, 0.0, 0.0, 1.0, 1.0]
    found = ratio([(hit, 1.0) for hit in hits])
    assert found.value == 0.6
    assert found.stderr == pytest.approx(math.sqrt(sum((h - 0.6) ** 2 for h in hits) / 4 / 5))


def test_the_standard_error_of_a_ratio_is_the_jackknife_s() -> None:
    draws = torch.rand(400, 2, generator=torch.Generator().manual_seed(0)).tolist()
    pairs = [(a * (1 + b), 1 + b) for a, b in draws]
    left_out = [ratio(pairs[:i] + pairs[i + 1 :]).value for i in range(400)]
    mean = sum(left_out) / 400
    jackknife = math.sqrt(399 / 400 * sum((value - mean) ** 2 for value in left_out))
    assert ratio(pairs).stderr == pytest.approx(jackknife, rel=0.01)


def test_pairing_cancels_what_items_have_in_common() -> None:
    draws = torch.randn(200, 2, generator=torch.Generator().manual_seed(1)).tolist()
    reference = [(10 * hard, 1.0) for hard, _ in draws]
    mine = [(10 * hard + 0.5 + 0.1 * noise, 1.0) for hard, noise in draws]
    found = paired_difference(mine, reference)
    assert found.value == pytest.approx(0.5, abs=0.03)
    assert found.stderr == pytest.approx(0.1 / math.sqrt(200), rel=0.2)
    assert found.stderr < ratio(mine).stderr / 50


def test_exp_is_a_perplexity() -> None:
    found = Estimate(3.0, 0.01).exp()
    assert found.value == pytest.approx(math.e**3)
    assert found.stderr == pytest.approx((math.exp(3.01) - math.exp(2.99)) / 2, rel=1e-3)
    assert Estimate(1000.0, 0.01).exp() == Estimate(math.inf, math.inf)
    assert math.isnan(Estimate(math.nan, math.nan).exp().value)


def test_a_single_item_has_no_standard_error() -> None:
    assert math.isnan(ratio([(1.0, 1.0)]).stderr)
    assert math.isnan(ratio([(0.0, 0.0), (0.0, 0.0)]).value)


def test_progress_with_the_time_left(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with Progress("plain", 100) as bar:
        now[0] = 10.0
        bar.update(10)
        assert capsys.readouterr().err == ""  # not thirty seconds yet
        now[0] = 40.0
        bar.update(25)
    assert capsys.readouterr().err == "plain: 25%, 2 min left\n"
    assert [duration(s) for s in (1.4, 99, 150, 7200)] == ["1 s", "99 s", "2 min", "2.0 h"]
