"""A plan's delta: weights of its own, read in the place of the checkpoint's by every way of loading."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from minisa.cache import StaticCache
from minisa.checkpoint import load_weights, open_checkpoint, with_delta, write_delta
from minisa.checkpoint.safetensors import read_safetensors, write_safetensors
from minisa.errors import MinisaError
from minisa.model import Transformer
from minisa.models.registry import choose_plan
from minisa.runners.native.build import open_library
from minisa.runners.native.runner import NativeRunner
from minisa.sharing import Delta, SharingPlan
from tests.models import in_one_go, random_tokens
from tests.tiny import random_weights, tiny_config, write_gguf, write_hf

CONFIG = tiny_config(n_layers=4, head_dim=32, hidden_dim=96, tie_embeddings=True)
PLAN = SharingPlan.following(4, {2: 1}, {2: [1, 0, 3, 3]})
NAMES = (
    "layers.2.attention.wo.weight",
    "layers.2.attention.wv.weight",
    "layers.3.ffn_norm.weight",
    "layers.3.attention.wq.weight",
    "layers.1.attention.wk.weight",
)


@pytest.fixture
def other() -> dict[str, torch.Tensor]:
    """Weights for NAMES, exact in bf16."""
    weights = random_weights(CONFIG, 1)
    return {name: weights[name].bfloat16().float() for name in NAMES}


@pytest.fixture(params=["hf", "gguf"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    weights = random_weights(CONFIG, 0)
    if request.param == "hf":
        return write_hf(tmp_path / "model", CONFIG, weights)
    return write_gguf(tmp_path / "m.gguf", CONFIG, weights, type="Q8_0")


def read(path: Path, delta: Delta | None, quantize: Any = None, dtype: torch.dtype = torch.float32) -> Transformer:
    checkpoint = open_checkpoint(path)
    with torch.device("meta"):
        model = Transformer(CONFIG, PLAN)
    load_weights(
        model,
        checkpoint if delta is None else with_delta(checkpoint, delta),
        device="cpu",
        dtype=dtype,
        quantize=quantize,
    )
    return model.requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_its_tensors_are_read_and_no_others_change(
    path: Path, other: dict[str, torch.Tensor], tmp_path: Path, dtype: torch.dtype
) -> None:
    delta = write_delta(tmp_path / "plan.safetensors", other, dtype)
    before, after = read(path, None).state_dict(), read(path, delta).state_dict()
    for name in before:
        assert torch.equal(after[name], other.get(name, before[name])), name


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_it_is_quantized_like_the_rest_and_the_native_step_takes_it(
    path: Path, other: dict[str, torch.Tensor], tmp_path: Path, format: str
) -> None:
    delta = write_delta(tmp_path / "plan.safetensors", other)
    model = read(path, delta, format, torch.bfloat16)
    step = {"int8": 1 / 127, "int4": 1 / 15}[format]
    for name in NAMES[:2]:
        error = (model.get_submodule(name.removesuffix(".weight")).weight - other[name]).abs().max()
        assert error < step * other[name].abs().max()
    library = open_library()
    if library is not None:
        tokens = random_tokens(CONFIG, 1, 12)
        cache = StaticCache.allocate(CONFIG, PLAN, max_seq_len=12)
        found = NativeRunner(model, library).prefill(tokens, 0, cache)
        with_it, without = (in_one_go(read(path, chosen, format), tokens)[:, -1] for chosen in (delta, None))
        assert (found - with_it).norm() < 0.2 * (found - without).norm()


def test_a_plan_keeps_it(other: dict[str, torch.Tensor], tmp_path: Path) -> None:
    delta = write_delta(tmp_path / "plan.safetensors", other)
    plan = SharingPlan.following(4, {2: 1}, {2: [1, 0, 3, 3]}, delta)
    plan.save(tmp_path / "plan.json", made={"text": "a.txt"})
    record = json.loads((tmp_path / "plan.json").read_text())
    assert (record["delta"], record["made"]) == ("plan.safetensors", {"text": "a.txt"})
    assert record["delta_sha256"] == hashlib.sha256((tmp_path / "plan.safetensors").read_bytes()).hexdigest()
    assert SharingPlan.load(tmp_path / "plan.json") == plan == choose_plan(tmp_path / "plan.json", CONFIG)
    (tmp_path / "sub").mkdir()
    with pytest.raises(MinisaError, match="save it beside them"):
        plan.save(tmp_path / "sub" / "plan.json")


@pytest.mark.parametrize(
    ("name", "shape", "dtype", "says"),
    [
        ("layers.9.attention.wo.weight", (64, 128), torch.float32, "'layers.9.attention.wo.weight' is no weight"),
        (NAMES[0], (64, 64), torch.float32, r"wo.weight is \[64, 64\], the model's is \[64, 128\]"),
        (NAMES[0], (64, 128), torch.float64, "stored as float64"),
    ],
)
def test_what_does_not_fit_is_said(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, says: str, path: Path, tmp_path: Path
) -> None:
    delta = write_delta(tmp_path / "d.safetensors", {name: torch.ones(shape)}, dtype)
    with pytest.raises(MinisaError, match=says):
        with_delta(open_checkpoint(path), delta)


def test_another_file_or_none(path: Path, other: dict[str, torch.Tensor], tmp_path: Path) -> None:
    checkpoint, delta = open_checkpoint(path), write_delta(tmp_path / "d.safetensors", other)
    write_delta(tmp_path / "d.safetensors", {NAMES[0]: other[NAMES[0]]})
    with pytest.raises(MinisaError, match="take the file that was written with the plan"):
        with_delta(checkpoint, delta)
    (tmp_path / "d.safetensors").unlink()
    with pytest.raises(MinisaError, match=r"d.safetensors: cannot read the plan's weights"):
        with_delta(checkpoint, delta)


def test_written_safetensors_are_read_back(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 5).half(), "b": torch.randn(7).bfloat16(), "c": torch.arange(6).view(2, 3)}
    write_safetensors(tmp_path / "t.safetensors", tensors)
    found = read_safetensors(tmp_path / "t.safetensors")
    assert {name: (t.dtype, t.shape) for name, t in found.items()} == {
        name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()
    }
    for name, tensor in tensors.items():
        assert torch.equal(found[name].read_rows(0, len(tensor)), tensor)
    assert [path.name for path in tmp_path.iterdir()] == ["t.safetensors"]
