"""python -m minisa selfcheck: what passes, what is left out, and that a wrong result is found."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from minisa import cli
from minisa.attention import AttentionBackend, HeadMap
from minisa.benchmark import selfcheck
from minisa.benchmark.selfcheck import attention_errors, attention_tensors
from minisa.runners.eager import TorchRunner

CPU = torch.device("cpu")


def run(*flags: str) -> Result:
    return CliRunner().invoke(cli.main, ["selfcheck", "--device", "cpu", *flags], standalone_mode=False)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels' own tests take their time in the interpreter; here they are left out, as on a user's CPU."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.real_model
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_every_check_has_its_line(quick: None, smollm2_path: Path) -> None:
    ran = run("--no-bench")
    lines = ran.output.splitlines()
    assert ran.return_value == 0
    assert [line[:20].strip() for line in lines[1:]] == list(selfcheck.CHECKS)
    assert "left out" in lines[1] and "no GPU here" in lines[1]
    assert "passed" in lines[3] and "C++ step, weights as they are" in lines[3] and "int4" in lines[3]
    assert "passed" in lines[4] and "fp8 cache" in lines[4]


def test_a_wrong_result_is_a_failure(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step whose logits are right and whose choice is not; a check that breaks down; a model that is not here."""
    chosen = TorchRunner.stepper
    monkeypatch.setattr(
        TorchRunner, "stepper", lambda *given: lambda *state: (chosen(*given)(*state)[0] * 0, state[1] + 1)
    )
    monkeypatch.setattr("minisa.engine.choose_runner", lambda model, *_: TorchRunner(model, name="C++ step"))
    monkeypatch.setattr("minisa.benchmark.selfcheck.local_path", lambda _: None)
    monkeypatch.setitem(selfcheck.CHECKS, "quantized products", lambda _: 1 / 0)  # type: ignore[misc,arg-type,return-value]
    ran = run("--no-bench")
    assert ran.return_value == 1
    _, _, products, steps, model = ran.output.splitlines()
    assert "FAILED" in products and "ZeroDivisionError: division by zero" in products
    assert "FAILED" in steps and "its whole steps choose other tokens" in steps
    assert "left out" in model and "python -m minisa pull" in model


def test_errors_of_attention_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison the kernels are held to, of a backend that forgets the head map."""
    pytest.importorskip("triton")
    right = selfcheck.find_backend("kernels", CPU)
    forgetful = AttentionBackend(
        "kernels", right.visible, right.lead, lambda shared, v, _: right.follow(shared, v, None)
    )
    monkeypatch.setattr(selfcheck, "find_backend", lambda *_: forgetful)
    tensors = attention_tensors(1, 4, 2, 64, torch.float32, CPU)
    lead, follow = attention_errors(*tensors, torch.tensor([9]), HeadMap.of([3, 0, 0, 1], 2), None)
    assert lead < 1e-5 < 0.5 < follow


def test_the_short_benchmark(monkeypatch: pytest.MonkeyPatch, quick: None) -> None:
    monkeypatch.setattr("minisa.benchmark.selfcheck.run_checks", lambda _: iter(()))
    ran = run()
    record = json.loads(ran.output.splitlines()[-1])
    assert ran.return_value == 0
    assert [c["name"] for c in record["configurations"]] == ["plain", "shared"]
    assert record["configurations"][1]["followers"] == 15
