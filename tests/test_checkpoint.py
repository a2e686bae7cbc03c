"""Round trips through every format, and what load_weights does with tensors that do not fit."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from minisa.checkpoint import Checkpoint, load, load_weights, open_checkpoint
from minisa.config import ModelConfig, RopeScaling
from minisa.errors import MinisaError
from tests.encode import write_safetensors
from tests.tiny import (
    empty_model,
    random_weights,
    rope_factors,
    tiny_config,
    write_gguf,
    write_hf,
    write_meta,
    write_mistral,
)

FORMATS: dict[str, Callable[[Path, ModelConfig, Mapping[str, Tensor]], Path]] = {
    "hf": write_hf,
    "hf-sharded": lambda path, config, weights: write_hf(path, config, weights, shards=3),
    "hf-bin": lambda path, config, weights: write_hf(path, config, weights, suffix=".bin"),
    "hf-bin-sharded": lambda path, config, weights: write_hf(path, config, weights, shards=3, suffix=".bin"),
    "meta": write_meta,
    "meta-2-shards": lambda path, config, weights: write_meta(path, config, weights, shards=2),
    "llama2-2-shards": lambda path, config, weights: write_meta(
        path, config, weights, shards=2, split_embeddings="columns"
    ),
    "mistral": write_mistral,
    "gguf": lambda path, config, weights: write_gguf(path / "model.gguf", config, weights),
}


def loaded(checkpoint: Checkpoint, followers: tuple[int, ...] = (), dtype: torch.dtype = torch.float32) -> nn.Module:
    model = empty_model(checkpoint.config, followers)
    load_weights(model, checkpoint, device="cpu", dtype=dtype)
    return model


def assert_equal(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    state = model.state_dict()
    assert state
    for name, tensor in state.items():
        assert torch.equal(tensor, weights[name]), name


def add_shard(path: Path, tensors: dict[str, Tensor]) -> None:
    """Turn a Hugging Face directory of one file into one of two, the second holding `tensors`."""
    shard_of = {tensor.name: "first.safetensors" for tensor in open_checkpoint(path).tensors.values()}
    (path / "model.safetensors").rename(path / "first.safetensors")
    write_safetensors(path / "second.safetensors", tensors)
    shard_of |= dict.fromkeys(tensors, "second.safetensors")
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shard_of}))


@pytest.mark.parametrize("chunk", [1, 1000, 1 << 19], ids=["row", "some-rows", "whole"])
@pytest.mark.parametrize("format", FORMATS)
def test_round_trip(format: str, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every format gives back its config and, bit for bit, its weights, whatever the chunks read at a time."""
    monkeypatch.setattr(load, "CHUNK", chunk)
    config = tiny_config(n_heads=6, n_kv_heads=2, head_dim=8, hidden_dim=96)
    weights = random_weights(config)
    checkpoint = open_checkpoint(FORMATS[format](tmp_path, config, weights))
    assert replace(checkpoint.config, norm_eps=config.norm_eps) == config
    assert checkpoint.config.norm_eps == pytest.approx(config.norm_eps)
    assert checkpoint.unknown == ()
    on_disk = [path for path in tmp_path.iterdir() if path.suffix != ".json"]
    assert checkpoint.nbytes == sum(path.stat().st_size for path in on_disk)
    assert_equal(loaded(checkpoint), weights)


@pytest.mark.parametrize("target", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("write", [write_hf, write_meta, write_mistral])
def test_weights_are_rounded_once(
    write: Callable[..., Path], stored: torch.dtype, target: torch.dtype, tmp_path: Path
) -> None:
    """Weights are rounded once, from the file's dtype to the one asked for; norms too."""
    config = tiny_config(n_layers=1)
    weights = random_weights(config)
    model = loaded(open_checkpoint(write(tmp_path, config, weights, dtype=stored)), dtype=target)
    assert {parameter.dtype for parameter in model.parameters()} == {target}
    assert_equal(model, {name: weight.to(stored).to(target) for name, weight in weights.items()})


def turned(rows: Tensor, pairs: list[tuple[int, int]], position: int) -> Tensor:
    """A head's vector [head_dim] after RoPE, in which dimensions `pairs[j]` turn together by the j-th frequency."""
    out = rows.clone()
    for j, (a, b) in enumerate(pairs):
        angle = torch.tensor(position * 10_000.0 ** (-2 * j / len(rows)))
        out[a] = rows[a] * angle.cos() - rows[b] * angle.sin()
        out[b] = rows[a] * angle.sin() + rows[b] * angle.cos()
    return out


def test_interleaved_rows_mean_the_same_after_loading(tmp_path: Path) -> None:
    """The file's q and k under interleaved RoPE, and the model's under half-split RoPE, give the same scores.

    A permutation wrong in both the writer and the loader would pass a round trip, and talk gibberish.
    """
    config = tiny_config(n_layers=1)
    path = write_mistral(tmp_path, config, random_weights(config))
    checkpoint = open_checkpoint(path)
    model = loaded(checkpoint)
    x = torch.randn(config.dim, generator=torch.Generator().manual_seed(1))
    d = config.head_dim
    scores = []
    for rows_of, pairs in (
        (
            lambda name: checkpoint.tensors[name].read_rows(0, checkpoint.tensors[name].shape[0]),
            [(2 * j, 2 * j + 1) for j in range(d // 2)],
        ),
        (lambda name: model.state_dict()[name], [(j, j + d // 2) for j in range(d // 2)]),
    ):
        q, k = (rows_of(f"layers.0.attention.{w}.weight") @ x for w in ("wq", "wk"))
        scores.append([turned(q[:d], pairs, t) @ turned(k[:d], pairs, 3) for t in range(8)])
    assert checkpoint.interleaved
    torch.testing.assert_close(torch.tensor(scores[0]), torch.tensor(scores[1]))
    assert torch.tensor(scores[0]).std() > 0.1


@pytest.mark.parametrize("format", ["hf", "hf-bin", "gguf"])
def test_tied_embeddings(format: str, tmp_path: Path) -> None:
    """A head that repeats the embedding is not loaded; where it is another, transformers 4 and 5 differ."""
    config = tiny_config(tie_embeddings=True)
    weights = random_weights(config)
    if format != "gguf":  # in torch's files the same bytes have both names
        weights["output.weight"] = weights["tok_embeddings.weight"]
    checkpoint = open_checkpoint(FORMATS[format](tmp_path, config, weights))
    assert checkpoint.config.tie_embeddings
    model = loaded(checkpoint)
    assert "output.weight" not in model.state_dict()
    assert_equal(model, weights)
    if format != "gguf":
        weights["output.weight"] = weights["tok_embeddings.weight"] + 1
        with pytest.raises(MinisaError, match=r"config\.json: the embeddings are tied, and lm_head\.weight is not the"):
            open_checkpoint(FORMATS[format](tmp_path, config, weights))


@dataclass(frozen=True)
class Untouchable:
    """A stored tensor that must not be read."""

    name: str
    shape: tuple[int, ...]

    def read_rows(self, start: int, stop: int) -> Tensor:
        raise AssertionError(f"{self.name} was read")


@pytest.mark.parametrize("format", FORMATS)
def test_followers_queries_and_keys_are_never_read(format: str, tmp_path: Path) -> None:
    config, followers = tiny_config(), (1, 3)
    weights = random_weights(config)
    checkpoint = open_checkpoint(FORMATS[format](tmp_path, config, weights))
    guarded = dict(checkpoint.tensors)
    for name in [f"layers.{i}.attention.{w}.weight" for i in followers for w in ("wq", "wk")]:
        guarded[name] = Untouchable(name, guarded[name].shape)
    model = loaded(replace(checkpoint, tensors=guarded), followers)
    assert_equal(model, weights)
    with pytest.raises(AssertionError, match="was read"):  # the guard guards: layer 3 leads here
        loaded(replace(checkpoint, tensors=guarded), (1,))


def test_followers_queries_and_keys_may_be_absent(tmp_path: Path) -> None:
    """A file that was saved without them loads into the model that does not want them."""
    config = tiny_config(n_layers=2)
    weights = random_weights(config)
    followed = {n: w for n, w in weights.items() if n.split(".attention.")[-1] not in ("wq.weight", "wk.weight")}
    followed |= {n: w for n, w in weights.items() if n.startswith("layers.0.")}
    checkpoint = open_checkpoint(write_hf(tmp_path, config, followed))
    assert_equal(loaded(checkpoint, (1,)), weights)
    with pytest.raises(MinisaError, match=r"missing: layers\.1\.attention\.wq\.weight, layers\.1\.attention\.wk"):
        loaded(checkpoint)


def test_one_error_lists_every_misfit(tmp_path: Path) -> None:
    config = tiny_config(n_layers=2)
    weights = random_weights(config)
    del weights["norm.weight"]
    weights["layers.0.ffn_norm.weight"] = torch.ones(config.dim + 1)
    weights["layers.2.attention.wq.weight"] = torch.ones(64, 64)  # the config has no layer 2
    path = write_hf(tmp_path, config, weights)
    add_shard(path, {"model.layers.0.self_attn.q_proj.bias": torch.ones(64)})
    model = empty_model(config)
    with pytest.raises(MinisaError) as caught:
        load_weights(model, open_checkpoint(path), device="cpu", dtype=torch.float32)
    assert str(caught.value) == (
        f"{path}: the tensors do not fit the model its config describes: missing: norm.weight; "
        "left over: layers.2.attention.wq.weight, 'model.layers.0.self_attn.q_proj.bias'; "
        "of another shape: layers.0.ffn_norm.weight [65] in place of [64]"
    )
    assert all(parameter.is_meta for parameter in model.parameters())  # nothing was allocated


def test_another_layouts_names_are_not_taken_for_ones_own(tmp_path: Path) -> None:
    """Meta's names in a Hugging Face directory have q and k rows in an order nobody knows."""
    config = tiny_config(n_layers=1)
    path = write_hf(tmp_path, config, random_weights(config))
    write_safetensors(path / "model.safetensors", random_weights(config))
    with pytest.raises(MinisaError, match=r"missing: .*; left over: 'tok_embeddings\.weight', 'layers\.0\.att"):
        loaded(open_checkpoint(path))


def test_rope_tables_in_the_file_are_ignored(tmp_path: Path) -> None:
    config = tiny_config(n_layers=1)
    weights = random_weights(config)
    path = write_hf(tmp_path, config, weights)
    tables = ("model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq")
    add_shard(path, dict.fromkeys(tables, torch.ones(8)))
    assert_equal(loaded(open_checkpoint(path)), weights)


def test_rope_factors_of_a_gguf_reach_the_config(tmp_path: Path) -> None:
    config = tiny_config(n_layers=1, rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 64))
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", config, random_weights(config)))
    scaling = checkpoint.config.rope_scaling
    assert scaling is not None
    assert scaling.kind == "factors"
    assert scaling.factors == pytest.approx(rope_factors(config))
    assert max(scaling.factors) == pytest.approx(8)
    loaded(checkpoint)


def test_progress_and_threads(tmp_path: Path) -> None:
    """Progress counts bytes of the model. Threads begun meanwhile have all of PyTorch's, and an error changes none."""
    config = tiny_config()
    checkpoint = open_checkpoint(write_hf(tmp_path, config, random_weights(config)))
    calls: list[tuple[int, int]] = []
    n_threads: set[int] = {torch.get_num_threads()}

    def look(done: int, total: int) -> None:
        calls.append((done, total))
        thread = threading.Thread(target=lambda: n_threads.add(torch.get_num_threads()))
        thread.start()
        thread.join()

    model = empty_model(config, (1,))
    load_weights(model, checkpoint, device="cpu", dtype=torch.bfloat16, progress=look)
    size = sum(parameter.nbytes for parameter in model.parameters())
    assert calls == sorted(calls)
    assert calls[-1] == (size, size)
    assert len(calls) >= len(model.state_dict())
    (tmp_path / "model.safetensors").write_bytes(b"short")
    with pytest.raises(MinisaError, match=r"model\.safetensors: ends \d+ bytes early"):
        loaded(checkpoint)
    assert n_threads == {torch.get_num_threads()}


def test_what_a_directory_is_taken_for(tmp_path: Path) -> None:
    config = tiny_config(n_layers=1)
    weights = random_weights(config)
    with pytest.raises(MinisaError, match=r"no model in this directory: looked for config\.json with model\.safet"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{}")  # a description alone is no model
    with pytest.raises(MinisaError, match="no model in this directory"):
        open_checkpoint(tmp_path)
    write_gguf(tmp_path / "a.gguf", config, weights)
    assert open_checkpoint(tmp_path).path == tmp_path / "a.gguf"
    write_gguf(tmp_path / "b.gguf", config, weights)
    with pytest.raises(MinisaError, match=r"holds 2 GGUF models: name one, such as .*a\.gguf"):
        open_checkpoint(tmp_path)
    write_mistral(tmp_path, config, weights)
    assert open_checkpoint(tmp_path).format == "Mistral's consolidated.safetensors"
    write_hf(tmp_path, config, weights, suffix=".bin")
    assert open_checkpoint(tmp_path).format == "Hugging Face pytorch_model.bin"
    write_hf(tmp_path, config, weights)  # as Mistral publishes: both layouts side by side
    assert open_checkpoint(tmp_path).format == "Hugging Face safetensors"


def test_mistral_in_parts_and_as_pth(tmp_path: Path) -> None:
    """Mistral's larger models come in parts with an index; its first one came as consolidated.00.pth."""
    config = tiny_config(n_layers=1, sliding_window=64)
    weights = random_weights(config)
    parts = write_mistral(tmp_path / "parts", config, weights)
    (parts / "consolidated.safetensors").rename(parts / "consolidated-00001-of-00001.safetensors")
    names = [*weights]
    index = {"weight_map": dict.fromkeys(names, "consolidated-00001-of-00001.safetensors")}
    (parts / "consolidated.safetensors.index.json").write_text(json.dumps(index))
    assert_equal(loaded(open_checkpoint(parts)), weights)

    pth = write_meta(tmp_path / "pth", config, weights)
    (pth / "params.json").write_text((parts / "params.json").read_text())
    checkpoint = open_checkpoint(pth)
    assert checkpoint.config.sliding_window == 64
    assert_equal(loaded(checkpoint), weights)
