"""The plans that come with minisa: small, whole, and what a bare --sa takes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from minisa.benchmark.presets import PRESETS
from minisa.errors import MinisaError
from minisa.models.registry import SHIPPED, choose_plan, find
from minisa.sharing import SharingPlan

PLANS = sorted((SHIPPED / "plans").glob("*.json"))


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_a_shipped_plan_fits_its_model_and_says_how_it_was_made(path: Path) -> None:
    model, _, followers = path.stem.rpartition("-")
    config = PRESETS[model]
    plan = SharingPlan.load(path).check(config)
    assert len(plan.followers) == int(followers)
    assert all(plan.head_maps[layer] is not None for layer in plan.followers)
    assert plan.delta is None or plan.delta.path.is_file()
    made = json.loads(path.read_text())["made"]
    assert made["model"] == model
    assert made["texts"] and all(len(text["sha256"]) == 64 for text in made["texts"])
    assert made["kv_saved"] == pytest.approx(len(plan.followers) / (2 * config.n_layers), abs=1e-4)
    assert path.stat().st_size < 10_000


def test_there_are_three_for_the_default_model_and_one_is_its_default() -> None:
    assert [path.stem for path in PLANS] == [f"smollm2-135m-{n}" for n in (12, 4, 8)]
    entry = find("smollm2-135m")
    assert entry.sa is not None
    assert choose_plan("default", PRESETS["smollm2-135m"], entry) == SharingPlan.load(SHIPPED / entry.sa)


def test_a_plan_made_for_another_model_is_refused() -> None:
    with pytest.raises(MinisaError, match="made for 30 layers, the model has 32"):
        choose_plan(SHIPPED / "plans/smollm2-135m-4.json", PRESETS["llama2-7b"])
