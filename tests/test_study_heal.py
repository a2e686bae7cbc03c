"""Healing: training that brings a shared model back to the plain one; the command lines of refit and heal."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable, Mapping
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from torch import Tensor

from minisa.checkpoint import as_stored
from minisa.checkpoint.safetensors import read_safetensors, write_safetensors
from minisa.cli import main
from minisa.engine import load
from minisa.errors import MinisaError
from minisa.model import Transformer
from minisa.sharing import SharingPlan
from minisa.study import heal as heal_module
from minisa.study.heal import heal, trainable
from minisa.study.judge import Judge
from minisa.study.loss import final_hidden
from minisa.study.plans import read_plan
from minisa.study.refit import refit
from minisa.study.training import Training, read_training, write_training
from minisa.study.walk import replace, share
from tests.loadable import N_TOKENS, loadable_hf
from tests.models import N_LAYERS, PLANS, SIX_LAYERS, build_model, in_one_go, random_tokens
from tests.study_models import another_of_its_name
from tests.tiny import random_weights, tiny_config, write_hf

PLAN = SharingPlan.following(N_LAYERS, {3: 1, 5: 4}, {5: [1, 0, 3, 2]})
TEXT, HELD_OUT = random_tokens(SIX_LAYERS, 24, 32), random_tokens(SIX_LAYERS, 6, 32).flip(0)


pytestmark = pytest.mark.usefixtures("one_thread")


def test_what_is_trained() -> None:
    parts = ["attention.wv", "attention.wo", "attention_norm", "ffn_norm"]
    assert trainable(PLAN, "followers") == [f"layers.{i}.{part}.weight" for i in (3, 5) for part in parts]
    leading = {f"layers.4.attention.{part}.weight" for part in ("wq", "wk")}  # followers have neither
    assert set(trainable(PLAN, "attention")) == leading | {
        f"layers.{i}.{part}.weight" for i in (3, 4, 5) for part in parts
    }
    assert set(trainable(PLAN, "all")) - set(trainable(PLAN, "attention")) == {
        f"layers.{i}.feed_forward.w{j}.weight" for i in (3, 4, 5) for j in (1, 2, 3)
    }


@pytest.mark.parametrize("which", heal_module.TRAINABLE)
def test_the_best_weights_are_kept_and_the_plain_model_is_left_alone(which: str) -> None:
    plain = build_model(SIX_LAYERS, PLANS["none"])
    before = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    training = Training()
    heal(plain, PLAN, TEXT, HELD_OUT, training, which=which, steps=30, rate=3e-3, batch=4)
    start = Judge(plain, HELD_OUT).divergence(PLAN)
    assert training.history[0] == (0, pytest.approx(start))
    assert training.best < 0.8 * start
    assert set(training.best_weights) == set(trainable(PLAN, which))
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
    return torch.stack(walk.onward([walk.embed(windows)], 0, keep=True))


def test_what_the_plan_brings_is_where_it_starts() -> None:
    plain = build_model(SIX_LAYERS, PLANS["none"])
    weights, _ = refit(plain, PLAN, TEXT, HELD_OUT, which="wo")
    assert "layers.4.attention.wo.weight" in weights  # not trained below, but part of the model
    training = Training()
    heal(plain, PLAN, TEXT, HELD_OUT, training, weights=weights, which="followers", steps=1, rate=1e-9)
    assert training.history[0][1] == pytest.approx(Judge(plain, HELD_OUT).divergence(PLAN, weights), rel=1e-4)


def test_broken_off_it_goes_on_with_the_same_steps(tmp_path: Path) -> None:
    plain = build_model(SIX_LAYERS, PLANS["none"])
    whole, broken = Training(), Training()
    options: dict[str, Any] = {"steps": 12, "rate": 1e-3, "batch": 4, "checks": 4}
    heal(plain, PLAN, TEXT, HELD_OUT, whole, **options)

    def interrupt() -> None:
        if broken.step >= 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        heal(plain, PLAN, TEXT, HELD_OUT, broken, saved=interrupt, **options)
    assert 3 <= broken.step < 12
    write_training(tmp_path / "state", {}, broken)
    resumed = read_training(tmp_path / "state", {}, whole.weights)
    heal(plain, PLAN, TEXT, HELD_OUT, resumed, **options)
    assert resumed.step == whole.step
    assert resumed.history[:2] == broken.history[:2]
    for name, tensor in whole.weights.items():
        assert torch.allclose(resumed.weights[name], tensor, atol=1e-6)


def test_a_longer_run_after_one_that_was_over_is_measured_too() -> None:
    plain = build_model(SIX_LAYERS, PLANS["none"])
    training = Training()
    for steps in (4, 8, 6):  # the last of them is over at once
        heal(plain, PLAN, TEXT, HELD_OUT, training, steps=steps, rate=1e-3, checks=2)
    assert [step for step, _ in training.history] == [0, 2, 4, 8]


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_broken_off_anywhere_it_comes_to_the_same_weights(signal_number: int, monkeypatch: pytest.MonkeyPatch) -> None:
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


# The command lines


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint with a byte-level tokenizer, two texts, and a plan."""
    config = tiny_config(n_layers=5, vocab_size=N_TOKENS, max_seq_len=64)
    folder = loadable_hf(tmp_path_factory.mktemp("heal") / "tiny", config)
    generator = torch.Generator().manual_seed(0)
    for name in ("a.txt", "b.txt"):
        letters = torch.randint(97, 123, (3000,), generator=generator).tolist()
        (folder.parent / name).write_bytes(bytes(letters))
    return folder


def invoke(command: str, folder: Path, *flags: object, **changes: object) -> Any:
    options: dict[str, object] = {
        "model": folder, "sa": "1:3", "text": folder.parent / "a.txt", "length": 16,
        "held-out-tokens": 320, "device": "cpu",
    }  # fmt: skip
    options |= {"tokens": 1600} if command == "refit" else {} if "minutes" in changes else {"steps": 2}
    options |= {name.replace("_", "-"): value for name, value in changes.items()}
    arguments = [command, *(str(part) for name, value in options.items() for part in (f"--{name}", value))]
    return CliRunner().invoke(main, [*arguments, *map(str, flags)])


def made(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())["made"]


@pytest.mark.parametrize("command", ["refit", "heal"])
def test_the_plan_and_its_weights_load(
    command: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judges: list[Judge] = []
    judged: list[dict[str, torch.Tensor]] = []

    class Recorded(Judge):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            judges.append(self)

        def divergence(self, plan: SharingPlan, weights: Mapping[str, torch.Tensor] | None = None) -> float:
            judged.append(dict(weights or {}))
            return super().divergence(plan, weights)

    monkeypatch.setattr("minisa.study.refit_command.Judge", Recorded)
    monkeypatch.setattr("minisa.study.heal.Judge", Recorded)
    out = tmp_path / "better.json"
    changes: dict[str, Any] = {} if command == "refit" else {"steps": 40, "rate": 3e-3}
    ran = invoke(command, folder, out=out, **changes)
    assert ran.exit_code == 0, (ran.output, ran.exception)
    assert judged[-1] and all(torch.equal(weight, weight.bfloat16().float()) for weight in judged[-1].values())
    record = made(out)
    assert record["divergence"] < record["divergence_before"]
    tensors = read_safetensors(tmp_path / "better.delta.safetensors")
    assert "layers.3.attention.wo.weight" in tensors
    plain, before = load(folder, device="cpu", dtype="fp32"), load(folder, sa="1:3", device="cpu", dtype="fp32")
    after = load(folder, sa=out, device="cpu", dtype="fp32")
    unseen = torch.randint(97, 123, (1, 60), generator=torch.Generator().manual_seed(9))
    wanted = final_hidden(plain.model, unseen)
    far, near = ((final_hidden(llm.model, unseen) - wanted).norm() for llm in (before, after))
    assert near < far
    assert plain.weight_bytes > after.weight_bytes == before.weight_bytes
    plan, weights = read_plan(str(folder), str(out))  # as what comes next takes it
    assert plan.sources == before.plan.sources and set(weights) == set(tensors)
    assert judges[-1].divergence(plan, weights) == pytest.approx(record["divergence"], abs=6e-6)  # what the file holds


def test_the_weights_take_no_other_file_s_place(folder: Path, tmp_path: Path) -> None:
    """Neither a checkpoint's, beside which the plan is written, nor those that the plan before it names."""
    model = shutil.copytree(folder, tmp_path / "tiny")
    before = (model / "model.safetensors").read_bytes()
    ran = invoke("refit", model, text=folder.parent / "a.txt", out=model / "model.json")
    assert ran.exit_code == 0, (ran.output, ran.exception)
    assert (model / "model.safetensors").read_bytes() == before
    assert SharingPlan.load(model / "model.json").delta.path == model / "model.delta.safetensors"


def test_flags_of_refit(folder: Path, tmp_path: Path) -> None:
    def run(name: str, *flags: object, **changes: object) -> tuple[dict[str, Any], list[str]]:
        ran = invoke("refit", folder, *flags, out=tmp_path / f"{name}.json", **changes)
        assert ran.exit_code == 0, (ran.output, ran.exception)
        return made(tmp_path / f"{name}.json"), [line.split()[0] for line in ran.stdout.splitlines()]

    base, rows = run("base")
    assert rows[1] == "layers.3.attention.wo.weight"
    assert (base["tokens"], base["held_out_tokens"], base["length"], base["seed"]) == (1600, 320, 16, 0)
    assert [text["file"] for text in base["texts"]] == ["a.txt"]
    assert run("seed", seed=3)[0]["divergence"] != base["divergence"]
    assert run("more", tokens=2000)[0]["tokens"] == 2000
    assert run("held", held_out_tokens=160)[0]["held_out_tokens"] == 160
    assert run("long", length=32)[0]["length"] == 32
    assert [t["file"] for t in run("both", "--text", folder.parent / "b.txt")[0]["texts"]] == ["a.txt", "b.txt"]
    assert len(run("all", matrices="all")[1]) == len(rows) + 3  # wo and w2 of layers 3 and 4
    assert run("plan", sa="2:3")[0]["divergence_before"] != base["divergence_before"]


def test_flags_of_heal(folder: Path, tmp_path: Path) -> None:
    def run(name: str, *flags: object, **changes: object) -> dict[str, Any]:
        ran = invoke("heal", folder, *flags, out=tmp_path / f"{name}.json", **changes)
        assert ran.exit_code == 0, (ran.output, ran.exception)
        return made(tmp_path / f"{name}.json")

    base = run("base")
    assert (base["steps"], base["held_out_tokens"], base["length"], base["train"]) == (2, 320, 16, "attention")
    assert run("seed", seed=3)["divergence"] != base["divergence"]
    assert run("steps", steps=3)["steps"] == 3
    assert run("minutes", minutes=0.02)["minutes"] <= 0.1
    assert invoke("heal", folder, out=tmp_path / "never.json", minutes=0).exit_code == 2
    assert run("held", held_out_tokens=160)["held_out_tokens"] == 160
    assert run("long", length=32)["length"] == 32
    assert run("rate", rate=1e-3)["divergence"] != base["divergence"]
    assert [t["file"] for t in run("both", "--text", folder.parent / "b.txt")["texts"]] == ["a.txt", "b.txt"]
    run("all", train="all")
    assert "layers.4.feed_forward.w1.weight" in read_safetensors(tmp_path / "all.delta.safetensors")
    assert run("plan", sa="2:3")["divergence_before"] != base["divergence_before"]


def test_a_second_run_goes_on_and_other_settings_are_refused(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "healed.json"
    assert invoke("heal", folder, out=out).exit_code == 0
    ran = invoke("heal", folder, out=out, steps=5)
    assert "going on from" in ran.stderr and ": 2 steps" in ran.stderr
    assert made(out)["steps"] == 5
    for changes, says in (
        ({"seed": 1}, "begun with seed 0, now it is 1"),
        ({"sa": "2:3"}, "begun with plan 1:3"),
        ({"model": another_of_its_name(folder, tmp_path)}, "begun with checkpoint"),
    ):
        error = invoke("heal", folder, out=out, **changes).exception
        assert isinstance(error, MinisaError) and says in str(error)
    state = Path(f"{out}.heal")
    tensors = {name: stored.read_rows(0, stored.shape[0]) for name, stored in read_safetensors(state).items()}
    name = "weights/layers.3.attention.wv.weight"
    without = {key: tensor for key, tensor in tensors.items() if key != name}
    for content, says in (
        ({**tensors, name: tensors[name][:-1]}, "weights are not those of this model: remove it"),
        (without, "weights are not those of this model"),
        (without | {name.replace("weights", "exp_avg"): tensors[name]}, "weights are not those of this model"),
        ({**tensors, "weights/layers.0.attention.wv.weight": tensors[name]}, "is nothing this model trains"),
        ({name: tensors[name]}, "not what a healing leaves: remove it"),
        ({"record": torch.zeros(3, dtype=torch.uint8)}, "not what a healing leaves"),
    ):
        write_safetensors(state, content)
        error = invoke("heal", folder, out=out, steps=9).exception
        assert isinstance(error, MinisaError) and says in str(error)
    state.write_bytes(b"no")
    error = invoke("heal", folder, out=out).exception
    assert isinstance(error, MinisaError) and "not what a healing leaves" in str(error)


@pytest.mark.parametrize("command", ["refit", "heal"])
def test_a_seed_of_more_than_64_bits_is_refused_at_once(command: str, folder: Path, tmp_path: Path) -> None:
    assert invoke(command, folder, out=tmp_path / "p.json", seed=1 << 63).exit_code == 2


@pytest.mark.parametrize(
    ("command", "changes", "says"),
    [
        ("refit", {"sa": "none"}, "--sa none: no layer follows"),
        ("refit", {"device": "tpu"}, "--device 'tpu' is not a device"),
        ("heal", {"device": "tpu"}, "--device 'tpu' is not a device"),
        ("heal", {"minutes": 1, "steps": 1}, "by either --minutes or --steps"),
        ("heal", {"held_out_tokens": 186 * 16}, "none is left: give more text"),
    ],
)
def test_what_cannot_be_done_is_said(
    command: str, changes: dict[str, Any], says: str, folder: Path, tmp_path: Path
) -> None:
    error = invoke(command, folder, out=tmp_path / "p.json", **changes).exception
    assert isinstance(error, MinisaError) and says in str(error)


def test_a_model_whose_numbers_overflow_has_no_plan(folder: Path, tmp_path: Path) -> None:
    """One that is made all the same would be the first of many that are all equally unknown."""
    config = tiny_config(n_layers=5, vocab_size=N_TOKENS, max_seq_len=64)
    weights = random_weights(config)
    weights["layers.1.feed_forward.w2.weight"].fill_(3e38)
    broken = shutil.copytree(folder, tmp_path / "tiny")
    write_hf(broken, config, weights)
    common = ["--model", str(broken), "--text", str(folder.parent / "a.txt"), "--length", "16"]
    few = ["--held-out-tokens", "64", "--out", str(tmp_path / "out.json")]
    for command in (
        ["refit", "--sa", "1:3", "--tokens", "64", *few],
        ["heal", "--sa", "1:3", "--steps", "1", *few],
        ["search", "--followers", "1", "--calibration-tokens", "64", *few],
        ["rivals", "drop", "1"],
    ):
        ran = CliRunner().invoke(main, [*command, *common])
        assert isinstance(ran.exception, MinisaError), (command, ran.output)
        assert "predictions are no numbers" in str(ran.exception)
    assert list(tmp_path.iterdir()) == [broken]
