"""Healing: training that brings a shared model back to the plain one."""

from __future__ import annotations

import signal
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minisa.checkpoint import as_stored
from minisa.model import Transformer
from minisa.sharing import SharingPlan
from minisa.study import heal as heal_module
from minisa.study.heal import Training, heal, trainable
from minisa.study.judge import Judge
from minisa.study.refit import refit
from minisa.study.resuming import read_state, write_state
from minisa.study.walk import replace, share
from tests.models import N_LAYERS, PLANS, SIX_LAYERS, build_model, in_one_go, random_tokens

PLAN = SharingPlan.following(N_LAYERS, {3: 1, 5: 4}, {5: [1, 0, 3, 2]})
TEXT, HELD_OUT = random_tokens(SIX_LAYERS, 24, 32), random_tokens(SIX_LAYERS, 6, 32).flip(0)


pytestmark = pytest.mark.usefixtures("one_thread")


def test_what_is_trained() -> None:
    parts = ["attention.wv", "attention.wo", "attention_norm", "ffn_norm"]
    leading = {f"layers.4.attention.{part}.weight" for part in ("wq", "wk")}  # followers have neither
    assert set(trainable(PLAN)) == leading | {f"layers.{i}.{part}.weight" for i in (3, 4, 5) for part in parts}


def test_the_best_weights_are_kept_and_the_plain_model_is_left_alone() -> None:
    plain = build_model(SIX_LAYERS, PLANS["none"])
    before = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    training = Training()
    heal(plain, PLAN, TEXT, HELD_OUT, training, steps=30, rate=3e-3, batch=4)
    start = Judge(plain, HELD_OUT).divergence(PLAN)
    assert training.history[0] == (0, pytest.approx(start))
    assert training.best < 0.8 * start
    assert set(training.best_weights) == set(trainable(PLAN))
    in_the_file = as_stored(training.best_weights)
    assert Judge(plain, HELD_OUT).divergence(PLAN, in_the_file) == pytest.approx(training.best, rel=1e-4)
    assert all(torch.equal(tensor, before[name]) for name, tensor in plain.state_dict().items())


def test_a_step_follows_the_gradient_of_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut at the first trained layer, at the logits and in chunks, it is the gradient of one whole expression."""
    monkeypatch.setattr("minisa.study.heal.ROWS", 10)
    plain = build_model(SIX_LAYERS, PLANS["none"])
    student = share(plain, PLAN)
    name = "layers.3.attention.wv.weight"
    replace(student, {name: student.get_parameter(name)})
    weight = student.get_parameter(name).requires_grad_()
    optimizer = torch.optim.SGD([weight], lr=1.0)
    before = weight.detach().clone()
    rows = slice(1, None, 2)
    heal_module._backward(heal_module.Walk(plain), heal_module.Walk(student), TEXT[:2], rows, 3)
    optimizer.step()
    found = before - weight.detach()
    with torch.no_grad():
        weight.copy_(before)
        wanted = in_one_go(plain, TEXT[:2])[:, rows].softmax(-1)
        targets = states_after_layers(plain, TEXT[:2])[3:]
    student.zero_grad()
    states = states_after_layers(student, TEXT[:2])[3:]
    logits = student.head(student.norm(states[-1]))[:, rows]
    divergence = F.kl_div(logits.log_softmax(-1), wanted, reduction="none").sum(-1).mean()
    distance = ((states - targets).norm(dim=-1) / targets.norm(dim=-1)).square().mean()
    (divergence + heal_module.STATES * distance).backward()
    assert weight.grad is not None
    assert torch.allclose(found, weight.grad, atol=1e-5, rtol=1e-3)


def states_after_layers(model: Transformer, windows: Tensor) -> Tensor:
    """[L, N, T, dim]."""
    walk = heal_module.Walk(model)
    return torch.stack(list(walk.onward([walk.embed(windows)], 0)))


def test_what_the_plan_brings_is_where_it_starts() -> None:
    plain = build_model(SIX_LAYERS, PLANS["none"])
    weights, _ = refit(plain, PLAN, TEXT, HELD_OUT)
    name = "layers.2.feed_forward.w2.weight"  # not trained, but part of the model
    weights[name] = plain.get_parameter(name) * 1.1
    training = Training()
    heal(plain, PLAN, TEXT, HELD_OUT, training, weights=weights, steps=1, rate=1e-9)
    assert training.history[0][1] == pytest.approx(Judge(plain, HELD_OUT).divergence(PLAN, weights), rel=1e-4)


def test_a_longer_run_after_one_that_was_over_is_measured_too() -> None:
    plain = build_model(SIX_LAYERS, PLANS["none"])
    training = Training()
    for steps in (4, 8, 6):  # the last of them is over at once
        heal(plain, PLAN, TEXT, HELD_OUT, training, steps=steps, rate=1e-3, checks=2)
    assert [step for step, _ in training.history] == [0, 2, 4, 8]


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_broken_off_anywhere_it_comes_to_the_same_weights(
    signal_number: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Also in the middle of Adam's step, and while the weights are measured: at the start, half way, at the end."""
    plain = build_model(SIX_LAYERS, PLANS["none"])
    options: dict[str, Any] = {"steps": 6, "rate": 1e-3, "batch": 4, "checks": 2}
    whole, broken = Training(), Training()
    heal(plain, PLAN, TEXT, HELD_OUT, whole, **options)

    def then_end(inner: Callable[..., Any], every: int) -> Callable[..., Any]:
        calls = count()

        def outer(*arguments: Any, **named: Any) -> Any:
            found = inner(*arguments, **named)
            if next(calls) % every == 0:
                signal.raise_signal(signal_number)
            return found

        return outer

    def end(number: int, _: object) -> None:
        raise SystemExit(number)

    ended, before = 0, signal.signal(signal.SIGTERM, end)
    monkeypatch.setattr(torch.Tensor, "addcdiv_", then_end(torch.Tensor.addcdiv_, 1))  # Adam's, for each matrix
    monkeypatch.setattr(Judge, "divergence", then_end(Judge.divergence, 2))
    try:
        while ended < 20:
            with suppress(KeyboardInterrupt, SystemExit):
                heal(plain, PLAN, TEXT, HELD_OUT, broken, **options)
                break
            ended += 1
            write_state(tmp_path / "state", {}, vars(broken))
            broken = Training(**read_state(tmp_path / "state", {}))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert ended == 9  # after each of six steps, and three measurements
    assert broken.history == whole.history
    assert all(torch.equal(broken.best_weights[name], tensor) for name, tensor in whole.best_weights.items())


def test_nothing_better_is_found_nothing_is_kept() -> None:
    plain = build_model(SIX_LAYERS, PLANS["none"])
    training = Training()
    heal(plain, PLAN, TEXT, HELD_OUT, training, steps=4, rate=1.0)
    assert training.best == training.history[0][1] and training.best_weights == {}
