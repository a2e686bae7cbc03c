"""Heal: the shared model learns to predict as the plain one does.

Distillation with Adam. The loss is KL(plain ‖ shared) of the predictions, and the distance of the hidden states after
every layer from the plain model's, which says more about each token than its prediction does. Only weights of the
layers from the first follower on are trained, so nothing before it is run twice or kept for the backward pass; both
models share every weight that is not trained.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from minisa.checkpoint import as_stored
from minisa.interrupts import uninterrupted
from minisa.model import Transformer
from minisa.sharing import SharingPlan
from minisa.study.judge import Judge
from minisa.study.walk import Walk, layer_of, replace, share

ROWS = 256  # positions whose predictions are held at once
WARM_UP = 10  # steps over which the rate rises; it then falls linearly to 0 at the end of the run
STATES = 20.0  # the weight, in nats, of a relative squared distance of 1 from the plain model's states
EVERY = 2  # predictions are compared at one position in so many: rows of the vocabulary are a quarter of a step's cost
_FOLLOWER = ("attention.wv", "attention.wo", "attention_norm", "ffn_norm")
_LEADER = ("attention.wq", "attention.wk", *_FOLLOWER)


@dataclass
class Training:
    """Where a training is: all that one broken off leaves for the next. Tensors by the names of trained parameters."""

    step: int = 0
    seconds: float = 0.0
    best: float = float("inf")  # divergence on held-out text, nats a token
    history: list[tuple[int, float]] = field(default_factory=list)  # (step, divergence)
    weights: dict[str, Tensor] = field(default_factory=dict)  # as trained so far
    best_weights: dict[str, Tensor] = field(default_factory=dict)  # empty where nothing beats the start
    optimizer: dict[str, Any] = field(default_factory=dict)  # Adam's state_dict


def trainable(plan: SharingPlan) -> list[str]:
    """Parameter names: the attention matrices and the norms of every layer from the first follower on."""
    layers = range(min(plan.followers), plan.n_layers)
    return [f"layers.{i}.{part}.weight" for i in layers for part in (_FOLLOWER if i in plan.followers else _LEADER)]


def heal(
    plain: Transformer,
    plan: SharingPlan,
    windows: Tensor,
    held_out: Tensor,
    training: Training,
    *,
    weights: Mapping[str, Tensor] | None = None,
    minutes: float | None = None,
    steps: int | None = None,
    rate: float = 2e-4,
    batch: int = 2,
    checks: int = 8,
    report: Callable[[str], None] = lambda line: None,
    saved: Callable[[], None] = lambda: None,
) -> None:
    """Train until minutes or steps are over; `training` is filled, and goes on from where it is.

    plain: without followers. windows [N, T] are taken in order, batch at a time, again from the first after the last.
    weights: what the plan brings already, in place of the model's. rate: Adam's, at its height. checks: how often in
    the run held_out is measured. saved: called after every check, and when the run is interrupted.
    """
    brought = dict(weights or {})
    names = trainable(plan)
    student = replace(share(plain, plan), brought | training.weights)
    replace(student, {name: student.get_parameter(name) for name in names})  # the plain model's must not be trained
    parameters = {name: student.get_parameter(name).requires_grad_() for name in names}
    optimizer = torch.optim.Adam(parameters.values(), lr=rate, betas=(0.9, 0.99))
    if training.optimizer:
        optimizer.load_state_dict(training.optimizer)
    judge = Judge(plain, held_out)
    first = min(map(layer_of, [*names, *brought]))
    teacher, learner = Walk(plain), Walk(student)
    began = time.monotonic() - training.seconds

    def share_done(step: int, seconds: float) -> float:
        """Of the run, 0 to 1."""
        return min(max(step / steps if steps else 0.0, seconds / (60 * minutes) if minutes else 0.0), 1.0)

    def keep() -> None:
        training.seconds = time.monotonic() - began
        training.weights = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        training.optimizer = optimizer.state_dict()
        saved()

    def check() -> None:
        now = {name: parameter.detach() for name, parameter in parameters.items()}
        divergence = judge.divergence(plan, brought | (as_stored(now) if training.step else now))
        with uninterrupted():
            training.history.append((training.step, divergence))
            if divergence < training.best:
                training.best = divergence
                if training.step:
                    training.best_weights = {name: tensor.clone() for name, tensor in now.items()}
            keep()
        report(f"step {training.step}: {divergence:.4f} nats a token from plain")

    try:
        if not training.history:
            check()
        checked = share_done(training.history[-1][0], training.seconds)
        while True:
            done = share_done(training.step, time.monotonic() - began)
            due = done == 1 or int(done * checks) > int(checked * checks)
            if due and training.step > training.history[-1][0]:
                check()
                checked = done
                continue
            if done == 1:
                return
            for group in optimizer.param_groups:
                group["lr"] = rate * min((training.step + 1) / WARM_UP, 1) * (1 - done)
            start = training.step * batch % len(windows)
            rows = slice(training.step % EVERY, None, EVERY)
            _backward(teacher, learner, windows[start : start + batch], rows, first)
            with uninterrupted():
                optimizer.step()
                training.step += 1
            optimizer.zero_grad(set_to_none=True)
    except (KeyboardInterrupt, SystemExit):
        keep()
        raise


def _backward(teacher: Walk, learner: Walk, windows: Tensor, rows: slice, first: int) -> None:
    """The gradient of one step's loss; layers before `first` run once.

    The loss is the mean divergence of predictions at `rows` of windows and STATES times the mean of
    ‖shared − plain‖² / ‖plain‖² over every position and every layer from `first` on.
    """
    with torch.no_grad():
        states = [teacher.embed(windows)]
        for i in range(first):
            states.append(teacher.layer(i, states[-1], {}))
        targets = list(teacher.onward(states, first))
        wanted = teacher.model.norm(targets[-1][:, rows]).flatten(0, 1)
    reached = list(learner.onward(states, first))
    distances = [((x - y).square().sum(-1) / y.square().sum(-1)).mean() for x, y in zip(reached, targets, strict=True)]
    found = learner.model.norm(reached[-1][:, rows]).flatten(0, 1)
    cut = found.detach().requires_grad_()  # its gradient is summed up from the logits of a few positions at a time
    for theirs, ours in zip(wanted.split(ROWS), cut.split(ROWS), strict=True):
        with torch.no_grad():
            target = teacher.model.head(theirs).float().softmax(-1)
        logits = learner.model.head(ours).float()
        # The cross entropy: the plain model's own entropy does not depend on what is trained.
        loss = (logits.logsumexp(-1) - torch.einsum("nv,nv->n", logits, target)).sum() / len(cut)
        loss.backward()
    torch.autograd.backward([found, STATES * torch.stack(distances).mean()], [cut.grad, None])
