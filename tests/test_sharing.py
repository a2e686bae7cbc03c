"""SharingPlan: notation, validation, files."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minisa.benchmark.presets import PRESETS
from minisa.errors import MinisaError
from minisa.sharing import SharingPlan


@pytest.mark.parametrize(
    ("spans", "sources"),
    [
        ("none", {}),
        ("27-30", {27: 26, 28: 26, 29: 26, 30: 26}),
        ("23-26,27-30", dict.fromkeys(range(23, 31), 22)),  # the nearest earlier layer that is not a follower
        ("27-30,23-26", dict.fromkeys(range(23, 31), 22)),  # in whatever order they are written
        ("22:23-26,27:28-30", {23: 22, 24: 22, 25: 22, 26: 22, 28: 27, 29: 27, 30: 27}),
        ("3:6,19:21,25:27,28:29", {6: 3, 21: 19, 27: 25, 29: 28}),
        ("19:21,20:22", {21: 19, 22: 20}),  # spans may interleave
        (" 5 , 7 : 9 - 10 ", {5: 4, 9: 7, 10: 7}),
    ],
)
def test_span_notation(spans: str, sources: dict[int, int]) -> None:
    plan = SharingPlan.parse(spans, 32)
    assert plan.sources == tuple(sources.get(layer, layer) for layer in range(32))
    assert plan.followers == tuple(sorted(sources))
    assert SharingPlan.parse(str(plan), 32) == plan


@pytest.mark.parametrize(
    ("spans", "says"),
    [
        ("0", "layer 0 cannot follow"),
        ("0-3", "layer 0 cannot follow"),
        ("5:0", "layer 0 cannot follow"),
        ("31-32", "layer 32 is outside the model, whose layers are 0 to 31"),
        ("7:5", "layer 5 cannot follow layer 7"),
        ("5:5", "names itself"),
        ("3:5,5:7", "layer 7 cannot follow layer 5, which itself follows layer 3"),
        ("3:5,4:5", "layer 5 stands in two spans"),
        ("9-7", "runs backwards: write 7-9"),
        ("a-b", "'a-b' is not a span"),
        ("", "'' is not a span"),
        ("3:5,", "'' is not a span"),
        ("1-99999", "layer 99999 is outside the model"),
    ],
)
def test_what_cannot_be_says_which_layer_and_why(spans: str, says: str) -> None:
    with pytest.raises(MinisaError, match=says.replace("(", r"\(")):
        SharingPlan.parse(spans, 32)


def test_a_plan_must_fit_the_model() -> None:
    config = PRESETS["smollm2-135m"]
    with pytest.raises(MinisaError, match="made for 32 layers, the model has 30"):
        SharingPlan.parse("27-30", 32).check(config)
    with pytest.raises(MinisaError, match="layer 6's head map has 3 entries"):
        SharingPlan.following(30, {6: 3}, {6: [0, 1, 2]}).check(config)
    with pytest.raises(MinisaError, match="layer 6's head map names head 9, the heads are 0 to 8"):
        SharingPlan.following(30, {6: 3}, {6: [0, 1, 2, 3, 4, 5, 6, 7, 9]}).check(config)
    with pytest.raises(MinisaError, match="layer 3 is a leader: only a follower has a head map"):
        SharingPlan.following(30, {6: 3}, {3: range(9)})


def test_picture_shows_every_layer_and_span() -> None:
    picture = SharingPlan.following(12, {3: 2, 11: 2}, {11: [0, 0]}).picture()
    strip, rest = picture.splitlines()[:2], picture.splitlines()[2:]
    assert "".join(line.split(maxsplit=1)[1] for line in strip).replace(" ", "") == "··Lf·······f"
    assert rest == ["layer 2 leads 3, 11 (head maps: 11)"]


def test_file_round_trip(tmp_path) -> None:
    plan = SharingPlan.following(30, {6: 3, 21: 19}, {21: [8, 7, 6, 5, 4, 3, 2, 1, 0]})
    plan.save(tmp_path / "plan.json")
    assert SharingPlan.load(tmp_path / "plan.json") == plan
    assert json.loads((tmp_path / "plan.json").read_text()) == {
        "version": 1,
        "n_layers": 30,
        "followers": {"6": {"leader": 3}, "21": {"leader": 19, "heads": [8, 7, 6, 5, 4, 3, 2, 1, 0]}},
    }


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "not valid JSON"),
        ("[]", "is a JSON list: expected an object"),
        ('{"version": 2}', "plan version 2 is not supported: expected 1"),
        ('{"version": 1, "n_layers": "x", "followers": {}}', "a whole number n_layers"),
        ('{"version": 1, "n_layers": 4, "followers": {}, "colour": 1}', "unknown key 'colour'"),
        ('{"version": 1, "n_layers": 4, "followers": {"x": {"leader": 1}}}', "expected .* followers"),
        ('{"version": 1, "n_layers": 4, "followers": {"2": {"heads": []}}}', "expected .* followers"),
        ('{"version": 1, "n_layers": 4, "followers": {"2": {"leader": 1, "heads": ["a"]}}}', "expected .* followers"),
        ('{"version": 1, "n_layers": 4, "followers": {"2": {"leader": 1, "why": 1}}}', "expected .* followers"),
        ('{"version": 1, "n_layers": 4, "followers": {"9": {"leader": 1}}}', "layer 9 is outside the model"),
        ('{"version": 1, "n_layers": 4, "followers": {"0": {"leader": 0}}}', "layer 0 names itself"),
        ('{"version": 1, "n_layers": 4, "followers": {}, "delta": "../x"}', "delta is '../x': expected the name"),
        ('{"version": 1, "n_layers": 99999999999, "followers": {}}', "n_layers"),
    ],
)
def test_a_bad_file_is_named(tmp_path, content: str, says: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(content)
    with pytest.raises(MinisaError, match=says):
        SharingPlan.load(path)


def test_a_plan_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that ends half way, as on a full disk."""
    path = tmp_path / "plan.json"
    SharingPlan.following(4, {2: 1}).save(path)

    def half(file: Path, text: str, **_: str) -> None:
        file.write_bytes(text[:10].encode())
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(OSError, match="No space left"):
        SharingPlan.following(4, {3: 1}).save(path)
    assert SharingPlan.load(path).followers == (2,)
    assert [file.name for file in tmp_path.iterdir()] == ["plan.json"]


def test_missing_and_binary_files(tmp_path) -> None:
    with pytest.raises(MinisaError, match="cannot read the plan"):
        SharingPlan.load(tmp_path / "none.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(MinisaError, match="not valid JSON"):
        SharingPlan.load(tmp_path / "binary.json")


@st.composite
def plans(draw: st.DrawFn) -> SharingPlan:
    n_layers = draw(st.integers(1, 40))
    leaders: dict[int, int] = {}
    for layer in range(1, n_layers):
        if draw(st.booleans()):
            leaders[layer] = draw(st.sampled_from([earlier for earlier in range(layer) if earlier not in leaders]))
    return SharingPlan.following(n_layers, leaders)


@given(plans())
def test_any_plan_survives_its_own_notation(plan: SharingPlan) -> None:
    assert SharingPlan.parse(str(plan), plan.n_layers) == plan
