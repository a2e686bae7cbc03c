"""The search for a plan: what it finds, that it goes on where it was, and its command line."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner

from minisa.cli import main
from minisa.engine import load
from minisa.errors import MinisaError
from minisa.model import Transformer
from minisa.sharing import SharingPlan
from minisa.study.findings import Findings, read_findings, write_findings
from minisa.study.judge import Judge
from minisa.study.search import Search
from minisa.study.text import sha256_of
from tests.loadable import N_TOKENS, loadable_hf
from tests.models import N_LAYERS, PLANS, SIX_LAYERS, build_model, random_tokens
from tests.study_models import another_of_its_name
from tests.tiny import tiny_config

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
    *_, found = search(twins(), Findings()).run(2)
    assert str(found.plan) == "2:3,4:5"
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


# The command line


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint with a byte-level tokenizer, and two texts."""
    config = tiny_config(n_layers=5, vocab_size=N_TOKENS, max_seq_len=64)
    folder = loadable_hf(tmp_path_factory.mktemp("search") / "tiny", config)
    generator = torch.Generator().manual_seed(0)
    for name in ("a.txt", "b.txt"):
        letters = torch.randint(97, 123, (800,), generator=generator).tolist()
        (folder.parent / name).write_bytes(bytes(letters))
    return folder


def invoke(folder: Path, *flags: object, **changes: object) -> Any:
    options = {
        "model": folder, "followers": 2, "text": folder.parent / "a.txt", "length": 16,
        "calibration-tokens": 64, "held-out-tokens": 64, "device": "cpu",
    } | {name.replace("_", "-"): value for name, value in changes.items()}  # fmt: skip
    arguments = [
        "search",
        *(str(part) for name, value in options.items() if value is not None for part in (f"--{name}", value)),
    ]
    return CliRunner().invoke(main, [*arguments, *map(str, flags)])


def made(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())["made"]


def test_the_plan_that_is_written_loads_and_says_how_it_was_made(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    ran = invoke(folder, out=out)
    assert ran.exit_code == 0, ran.output
    plan = SharingPlan.load(out)
    assert len(plan.followers) == 2
    assert load(folder, sa=out, device="cpu").plan == plan
    record = made(out)
    assert record["model"] == "tiny"
    assert record["texts"] == [{"file": "a.txt", "sha256": sha256_of(folder.parent / "a.txt")}]
    assert (record["length"], record["calibration_tokens"], record["held_out_tokens"]) == (16, 64, 64)
    assert record["kv_saved"] == 0.2
    assert record["perplexity_ratio"] > 0
    rows = [line.split() for line in ran.stdout.splitlines()]
    assert [row[:2] for row in rows[1:3]] == [["1", "10.0%"], ["2", "20.0%"]]
    assert f"{out}: {plan}" in ran.stdout


def test_a_second_run_measures_nothing_again_and_other_settings_are_refused(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    assert invoke(folder, out=out).exit_code == 0
    first = out.read_text()
    state = Path(f"{out}.search")
    kept = state.read_text()
    ran = invoke(folder, out=out, budget_minutes=0)
    assert "going on from" in ran.stderr and (out.read_text(), state.read_text()) == (first, kept)
    ran = invoke(folder, out=out, seed=1)
    assert isinstance(ran.exception, MinisaError)
    assert "begun with seed 0, now it is 1: remove the file, or give another --out" in str(ran.exception)
    ran = invoke(another_of_its_name(folder, tmp_path), out=out, text=folder.parent / "a.txt")
    assert isinstance(ran.exception, MinisaError) and "begun with checkpoint" in str(ran.exception)


DAMAGE: dict[str, Any] = {
    "no object": [],
    "nothing in it": {},
    "pairs missing": {"pairs": {"0:1": [1.0, [0, 1, 2, 3]]}},
    "pairs of nothing": {"pairs": {"0:9": [1.0, [0, 1, 2, 3]]}},
    "a pair alone": {"0:1": 1.0},
    "errors as text": {"0:1": ["1.0", [0, 1, 2, 3]]},
    "errors of 0": {"0:1": [0, [0, 1, 2, 3]]},
    "errors without end": {"0:1": [math.inf, [0, 1, 2, 3]]},
    "errors beyond floats": {"0:1": [10**400, [0, 1, 2, 3]]},
    "heads as text": {"0:1": [1.0, "0123"]},
    "heads that are none": {"0:1": [1.0, [0, 1, 2, 4]]},
    "heads too few": {"0:1": [1.0, [0, 1]]},
    "divergences as text": {"measured": {"1<0": "0.5"}},
    "divergences in a list": {"measured": [0.5]},
    "maps of no plan": {"maps": {"x": {}}},
    "maps of a leader": {"maps": {"1:2": {"1": [0, 1, 2, 3]}}},
    "maps of text": {"maps": {"1:2": {"2": "heads"}}},
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_state_that_no_search_leaves(damage: Any, tmp_path: Path) -> None:
    state, config = tmp_path / "plan.json.search", tiny_config(n_layers=3)
    pairs = dict.fromkeys(((0, 1), (0, 2), (1, 2)), (1.0, (0, 1, 2, 3)))
    findings = Findings(pairs, {"1<0": 0.5, "none": -1e-9}, {"1:2": {2: (3, 2, 1, 0)}, "none": {}})
    write_findings(state, {}, findings)
    assert read_findings(state, {}, config) == findings
    record = json.loads(state.read_text())
    if not damage:
        record = damage
    elif "0:1" in damage:
        record["pairs"] |= damage
    else:
        record |= damage
    state.write_text(json.dumps(record))
    with pytest.raises(MinisaError, match="not what a search leaves: remove it to begin again"):
        read_findings(state, {}, config)


def test_every_flag_has_its_effect(folder: Path, tmp_path: Path) -> None:
    def run(name: str, *flags: object, **changes: object) -> tuple[dict[str, Any], Any]:
        ran = invoke(folder, *flags, out=tmp_path / name, **changes)
        assert ran.exit_code == 0, (ran.output, ran.exception)
        return json.loads((tmp_path / name).read_text()), ran

    base, ran = run("base.json")
    hasty, in_haste = run("hasty.json", budget_minutes=0)
    assert hasty["made"]["divergence"] >= base["made"]["divergence"]
    assert len(in_haste.stderr.splitlines()) < len(ran.stderr.splitlines()) and "of 0 min]" in in_haste.stderr
    assert run("seed.json", seed=5)[0]["made"]["divergence"] != base["made"]["divergence"]
    assert run("long.json", length=32)[0]["made"]["length"] == 32
    assert run("less.json", calibration_tokens=32)[0]["made"]["calibration_tokens"] == 32
    assert run("few.json", held_out_tokens=32)[0]["made"]["held_out_tokens"] == 32
    both = run("both.json", "--text", folder.parent / "b.txt")[0]["made"]["texts"]
    assert [text["file"] for text in both] == ["a.txt", "b.txt"]
    other = run("other.json", validation=folder.parent / "b.txt")[0]["made"]
    assert [text["file"] for text in other["texts"]] == ["a.txt", "b.txt"]
    assert other["divergence"] != base["made"]["divergence"]
    assert len(SharingPlan.load(tmp_path / "base.json").followers) == 2
    run("three.json", followers=3)
    assert len(SharingPlan.load(tmp_path / "three.json").followers) == 3
    mapped, ran = run("mapped.json", "--spans", "1:3", followers=None)
    assert mapped["followers"]["3"]["leader"] == 1 and len(mapped["followers"]["3"]["heads"]) == 4
    assert len(ran.stderr.splitlines()) < len(in_haste.stderr.splitlines())  # nothing is searched
    pytest.importorskip("matplotlib")
    run("plot.json", plot=tmp_path / "plot.xyz")
    assert (tmp_path / "plot.xyz").read_bytes().startswith(b"\x89PNG")  # whatever its name


def test_plans_are_measured_on_echoes_too(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def divergence(name: str) -> float:
        assert invoke(folder, "--spans", "1:3", followers=None, out=tmp_path / name).exit_code == 0
        return made(tmp_path / name)["divergence"]

    with_echoes = divergence("with.json")
    monkeypatch.setattr("minisa.study.search_command.echoing", lambda windows, _: windows)
    assert divergence("without.json") != with_echoes


def test_what_cannot_be_done_is_said(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for changes, says in (
        ({"text": tmp_path / "none.txt"}, "none.txt: cannot read"),
        ({"device": "tpu"}, "--device 'tpu' is not a device"),
        ({"followers": None}, "by --followers, or which, by --spans"),
        ({"followers": 5}, "--followers is 5: expected 1 to 4"),
        ({"calibration_tokens": 4000}, "windows of 16 tokens, 254 are needed"),
    ):
        error = invoke(folder, **{"out": tmp_path / "plan.json", **changes}).exception
        assert isinstance(error, MinisaError) and says in str(error)
    with pytest.raises(MinisaError, match="cannot keep the state of the search"):
        write_findings(tmp_path / "none" / "plan.json.search", {}, Findings())
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    error = invoke(folder, out=tmp_path / "plan.json", plot=tmp_path / "p.png").exception
    assert isinstance(error, MinisaError | click.ClickException) and "minisa[plots]" in str(error)
