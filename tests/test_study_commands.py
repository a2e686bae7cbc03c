"""The command lines of search, refit and heal: the plans they write, every flag, and going on where one was."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from minisa.checkpoint.safetensors import read_safetensors
from minisa.cli import main
from minisa.engine import load
from minisa.errors import MinisaError
from minisa.sharing import SharingPlan
from minisa.study.judge import Judge
from minisa.study.loss import final_hidden
from minisa.study.plans import read_plan
from minisa.study.text import sample, sha256_of
from tests.study_models import DEFAULTS, FIVE_LAYERS, another_of_its_name, invoke, made
from tests.tiny import random_weights, write_hf

pytestmark = pytest.mark.usefixtures("one_thread")


def test_search_writes_a_plan_that_loads_and_says_how_it_was_made(study_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    ran = invoke("search", study_folder, out)
    assert ran.exit_code == 0, ran.output
    plan = SharingPlan.load(out)
    assert len(plan.followers) == 2 and f"{out}: {plan}" in ran.stdout
    assert load(study_folder, sa=out, device="cpu").plan == plan
    rows = [line.split() for line in ran.stdout.splitlines()]
    assert [row[:2] for row in rows[1:3]] == [["1", "10.0%"], ["2", "20.0%"]]
    record = made("search", study_folder, out)  # once more, from what it has measured
    assert record["model"] == "tiny" and record["kv_saved"] == 0.2 and record["perplexity_ratio"] > 0
    assert record["texts"] == [{"file": "a.txt", "sha256": sha256_of(study_folder.parent / "a.txt")}]


@pytest.mark.parametrize("command", ["refit", "heal"])
def test_the_weights_it_writes_bring_the_model_nearer(command: str, study_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "better.json"
    changes: dict[str, Any] = {"heal": {"steps": 40, "rate": 3e-3}}.get(command, {})
    record = made(command, study_folder, out, **changes)
    assert record["divergence"] < record["divergence_before"]
    tensors = read_safetensors(tmp_path / "better.delta.safetensors")
    assert "layers.3.attention.wo.weight" in tensors
    plain, before, after = (load(study_folder, sa=sa, device="cpu", dtype="fp32") for sa in (None, "1:3", out))
    unseen = torch.randint(97, 123, (1, 60), generator=torch.Generator().manual_seed(9))
    wanted = final_hidden(plain.model, unseen)
    far, near = ((final_hidden(llm.model, unseen) - wanted).norm() for llm in (before, after))
    assert near < far
    assert plain.weight_bytes > after.weight_bytes == before.weight_bytes
    plan, weights = read_plan(str(study_folder), str(out))  # as the next command takes it
    assert plan.sources == before.plan.sources and set(weights) == set(tensors)
    held_out, _ = sample(plain, [study_folder.parent / "a.txt"], 16, (20,), 0)
    assert Judge(plain.model, held_out).divergence(plan, weights) == pytest.approx(record["divergence"], abs=6e-6)


FLAGS: list[tuple[str, dict[str, Any], str, Any]] = [  # command, flags, what they change in the record, to what
    ("search", {"seed": 5}, "divergence", None),
    ("search", {"length": 32}, "length", 32),
    ("search", {"calibration_tokens": 32}, "calibration_tokens", 32),
    ("search", {"held_out_tokens": 32}, "held_out_tokens", 32),
    ("search", {"followers": 3}, "kv_saved", 0.3),
    ("search", {"followers": None, "spans": "1:3"}, "kv_saved", 0.1),
    ("refit", {"seed": 3}, "divergence", None),
    ("refit", {"length": 32}, "length", 32),
    ("refit", {"tokens": 2000}, "tokens", 2000),
    ("refit", {"held_out_tokens": 160}, "held_out_tokens", 160),
    ("refit", {"sa": "2:3"}, "divergence_before", None),
    ("heal", {"seed": 3}, "divergence", None),
    ("heal", {"length": 32}, "length", 32),
    ("heal", {"steps": 3}, "steps", 3),
    ("heal", {"held_out_tokens": 160}, "held_out_tokens", 160),
    ("heal", {"rate": 1e-3}, "divergence", None),
    ("heal", {"sa": "2:3"}, "divergence_before", None),
]


@pytest.fixture(scope="module")
def base(study_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The record of each command with the flags it has by default."""
    folder = tmp_path_factory.mktemp("base")
    return {command: made(command, study_folder, folder / f"{command}.json") for command in DEFAULTS}


@pytest.mark.parametrize(("command", "flags", "key", "value"), FLAGS)
def test_every_flag_has_its_effect(
    command: str, flags: dict[str, Any], key: str, value: Any, base: Any, study_folder: Path, tmp_path: Path
) -> None:
    found = made(command, study_folder, tmp_path / "p.json", **flags)[key]
    assert found != base[command][key]
    assert value is None or found == value


@pytest.mark.parametrize("command", DEFAULTS)
def test_texts_add_up(command: str, study_folder: Path, tmp_path: Path) -> None:
    record = made(command, study_folder, tmp_path / "p.json", "--text", study_folder.parent / "b.txt")
    assert [text["file"] for text in record["texts"]] == ["a.txt", "b.txt"]


def test_time_ends_a_search_and_a_healing(study_folder: Path, tmp_path: Path) -> None:
    measured = []
    for minutes in (30, 0):
        out = tmp_path / f"{minutes}.json"
        assert f"of {minutes} min]" in invoke("search", study_folder, out, budget_minutes=minutes).stderr
        measured.append(torch.load(f"{out}.search", weights_only=True)["state"]["measured"])
    assert len(measured[1]) < len(measured[0])
    assert made("heal", study_folder, tmp_path / "h.json", steps=None, minutes=0.02)["minutes"] <= 0.1


def test_plans_are_measured_on_echoes_too(study_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spans: dict[str, Any] = {"spans": "1:3", "followers": None}
    with_echoes = made("search", study_folder, tmp_path / "with.json", **spans)
    monkeypatch.setattr("minisa.study.text.echoing", lambda windows, _: windows)
    assert made("search", study_folder, tmp_path / "without.json", **spans)["divergence"] != with_echoes["divergence"]


@pytest.mark.parametrize("command", ["search", "heal"])
def test_a_second_run_goes_on_and_other_settings_are_refused(command: str, study_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    first = invoke(command, study_folder, out)
    again = invoke(command, study_folder, out, **({"steps": 5} if command == "heal" else {}))
    assert "going on from" not in first.stderr and f"going on from {out}.{command}: " in again.stderr
    if command == "search":
        assert again.stdout == first.stdout
    for changes, says in (
        ({"seed": 1}, "begun with seed 0, now it is 1"),
        ({"model": another_of_its_name(study_folder, tmp_path)}, "begun with checkpoint"),
        ({"sa": "2:3"} if command == "heal" else {"text": study_folder.parent / "b.txt"}, "begun with "),
    ):
        error = invoke(command, study_folder, out, **changes).exception
        assert isinstance(error, MinisaError) and says in str(error)


@pytest.mark.parametrize(
    ("command", "changes", "says"),
    [
        ("search", {"text": "none.txt"}, "none.txt: cannot read"),
        ("search", {"device": "tpu"}, "--device 'tpu' is not a device"),
        ("search", {"followers": None}, "by --followers, or which, by --spans"),
        ("search", {"followers": 5}, "--followers is 5: expected 1 to 4"),
        ("search", {"calibration_tokens": 4000}, "windows of 16 tokens, 254 are needed"),
        ("refit", {"sa": "none"}, "--sa none: no layer follows"),
        ("refit", {"device": "tpu"}, "--device 'tpu' is not a device"),
        ("heal", {"device": "tpu"}, "--device 'tpu' is not a device"),
        ("heal", {"minutes": 1}, "by either --minutes or --steps"),
        ("heal", {"held_out_tokens": 186 * 16}, "none is left: give more text"),
    ],
)
def test_what_cannot_be_done_is_said(
    command: str, changes: dict[str, Any], says: str, study_folder: Path, tmp_path: Path
) -> None:
    error = invoke(command, study_folder, tmp_path / "p.json", **changes).exception
    assert isinstance(error, MinisaError) and says in str(error)


def test_a_model_whose_numbers_overflow_has_no_plan(study_folder: Path, tmp_path: Path) -> None:
    """A plan for it would be the first of many that are all equally unknown."""
    weights = random_weights(FIVE_LAYERS)
    weights["layers.1.feed_forward.w2.weight"].fill_(3e38)
    broken = shutil.copytree(study_folder, tmp_path / "tiny")
    write_hf(broken, FIVE_LAYERS, weights)
    text = study_folder.parent / "a.txt"
    runs = [invoke(command, broken, tmp_path / "out.json", text=text) for command in DEFAULTS]
    arguments = ["baselines", "drop", "1", "--model", str(broken), "--text", str(text), "--length", "16"]
    for ran in (*runs, CliRunner().invoke(main, arguments)):
        assert isinstance(ran.exception, MinisaError), ran.output
        assert "predictions are no numbers" in str(ran.exception)
    assert list(tmp_path.iterdir()) == [broken]
