"""Logits against transformers' LlamaForCausalLM and MistralForCausalLM: an independent implementation."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from minisa import LLM
from minisa.cache import StaticCache
from minisa.checkpoint import load_weights, open_checkpoint
from minisa.config import RopeScaling
from minisa.model import Transformer
from minisa.sharing import SharingPlan
from tests.families import FAMILIES
from tests.models import in_one_go
from tests.tiny import random_weights, tiny_config, write_gguf, write_hf, write_meta, write_mistral

transformers = pytest.importorskip("transformers", reason='needs pip install "minisa[peers]"')


def peer_logits(path: Path, tokens: Tensor) -> Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    with torch.inference_mode():
        return model(tokens).logits


def load(path: Path) -> Transformer:
    checkpoint = open_checkpoint(path)
    with torch.device("meta"):
        model = Transformer(checkpoint.config, SharingPlan.none(checkpoint.config.n_layers))
    load_weights(model, checkpoint, device="cpu", dtype=torch.float32)
    return model


def our_logits(path: Path, tokens: Tensor) -> Tensor:
    model = load(path)
    with torch.inference_mode():
        return in_one_go(model, tokens)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str, tmp_path: Path) -> None:
    """A small random model of each, in shards, gives transformers' logits, and so does its GGUF."""
    config = FAMILIES[family].in_miniature()
    weights = random_weights(config, 1)
    tokens = torch.randint(config.vocab_size, (2, 100), generator=torch.Generator().manual_seed(2))
    expected = peer_logits(write_hf(tmp_path / "hf", config, weights, shards=2), tokens)
    assert expected.std() > 0.1  # there is something to compare
    for path in (tmp_path / "hf", write_gguf(tmp_path / "model.gguf", config, weights)):
        assert (our_logits(path, tokens) - expected).abs().max() < 1e-4


def test_what_torch_saves_of_a_model(tmp_path: Path) -> None:
    """pytorch_model.bin as transformers 4.30 wrote it: a state dict with its metadata and the tables of RoPE."""
    config = FAMILIES["llama-7b"].in_miniature()
    path = write_hf(tmp_path, config, random_weights(config, 1))
    tokens = torch.randint(config.vocab_size, (2, 100), generator=torch.Generator().manual_seed(2))
    expected = peer_logits(path, tokens)
    state = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).state_dict()
    assert state._metadata
    state |= {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(16) for i in range(2)}
    torch.save(state, path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()
    assert (our_logits(path, tokens) - expected).abs().max() < 1e-4


def test_a_ring_that_has_wrapped(tmp_path: Path) -> None:
    config, plain = replace(FAMILIES["mistral-7b-v0.1"].in_miniature(), max_seq_len=512), SharingPlan.none(2)
    path = write_hf(tmp_path, config, random_weights(config, 1))
    tokens = torch.randint(config.vocab_size, (1, 300), generator=torch.Generator().manual_seed(2))
    cache = StaticCache.allocate(config, plain, batch=1, max_seq_len=300)
    assert cache.slots < 100
    model, found = load(path), []
    with torch.inference_mode():
        for start in range(0, 300, 60):
            positions = torch.arange(start, start + 60)[None]
            found.append(model(tokens[:, start : start + 60], positions, cache.view(start + 60)))
    expected = peer_logits(path, tokens)
    assert expected.std() > 0.1
    assert (torch.cat(found, 1) - expected).abs().max() < 1e-4


def test_dynamic_scaling_changes_nothing_within_the_context(tmp_path: Path) -> None:
    config = tiny_config(max_seq_len=100)
    path = write_hf(tmp_path, config, random_weights(config, 1))
    raw = json.loads((path / "config.json").read_text())
    tokens = torch.randint(config.vocab_size, (1, 100), generator=torch.Generator().manual_seed(2))
    plain = peer_logits(path, tokens)
    (path / "config.json").write_text(json.dumps(raw | {"rope_scaling": {"type": "dynamic", "factor": 4.0}}))
    assert (our_logits(path, tokens) - peer_logits(path, tokens)).abs().max() < 1e-4
    assert (our_logits(path, tokens) - plain).abs().max() < 1e-4


@pytest.mark.parametrize(
    "scaling",
    [
        RopeScaling("linear", 2.0),
        RopeScaling("yarn", 4.0, original_max_seq_len=32, attention_factor=1.14),
        RopeScaling("yarn", 8.0, original_max_seq_len=512, beta_fast=8.0, beta_slow=2.0, attention_factor=2.0),
    ],
    ids=["linear", "yarn", "yarn with settings"],
)
def test_other_scalings(scaling: RopeScaling, tmp_path: Path) -> None:
    config = tiny_config(rope_scaling=scaling)
    tokens = torch.randint(config.vocab_size, (2, 100), generator=torch.Generator().manual_seed(2))
    path = write_hf(tmp_path, config, random_weights(config, 1))
    assert (our_logits(path, tokens) - peer_logits(path, tokens)).abs().max() < 1e-4


@pytest.mark.parametrize("write", [write_meta, write_mistral, write_gguf], ids=["meta", "mistral", "gguf"])
def test_every_format_of_one_model(write: Any, tmp_path: Path) -> None:
    """The interleaved q and k of Meta's, Mistral's and GGUF files are put right."""
    config = tiny_config(n_heads=4, n_kv_heads=2, rope_theta=10_000.0, max_seq_len=4096)
    weights = random_weights(config, 1)
    tokens = torch.randint(config.vocab_size, (2, 60), generator=torch.Generator().manual_seed(2))
    write_hf(tmp_path / "hf", config, weights)
    path = tmp_path / ("model.gguf" if write is write_gguf else "other")
    write(path, config, weights)
    assert (our_logits(path, tokens) - peer_logits(tmp_path / "hf", tokens)).abs().max() < 1e-4


@pytest.mark.real_model
def test_smollm2_over_512_tokens(smollm2: LLM, tmp_path: Path) -> None:
    """The default model's dequantized weights in transformers: largest difference of any logit below 2e-3."""
    config = smollm2.config
    weights = {name: tensor.float() for name, tensor in smollm2.model.state_dict().items()}
    write_hf(tmp_path, replace(config, max_seq_len=1024), weights)
    prose = (Path(__file__).parents[1] / "LICENSE").read_text(encoding="utf-8")
    text = prose + "def f(x):\n    return x ** 2 + 1234567  # ζωή, 生活, жизнь 🙂\n" * 8 + prose
    tokens = smollm2.tokenizer.encode(text)[:512]
    assert len(tokens) == 512
    difference = (smollm2.logits(tokens) - peer_logits(tmp_path, torch.tensor([tokens]))[0]).abs().max()
    assert difference < 2e-3
