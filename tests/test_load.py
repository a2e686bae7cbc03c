"""What load() is given: options that cannot be are refused by name; what a checkpoint says of itself counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from minisa import MinisaError, load
from minisa.models.registry import find
from tests.loadable import N_TOKENS, chat_model, loadable_hf
from tests.tiny import tiny_config


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"device": "abacus"}, "--device '?abacus'? is not a device"),
        ({"max_seq_len": 257}, "max_seq_len is 257: expected 1 to 256"),
        ({"max_batch": 0}, "max_batch is 0: expected 1 or more"),
        ({"kv_dtype": "fp4"}, "--kv-dtype 'fp4' is not supported"),
        ({"backend": "flash"}, "backend 'flash' is not one: expected reference, torch or kernels"),
        ({"backend": "kernels"}, "backend 'kernels' is for CUDA, the device is cpu: leave it out, or take 'torch'"),
    ],
)
def test_options_that_cannot_be(
    options: dict[str, Any], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before weights are read, which may take minutes."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr("minisa.engine.load_weights", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(MinisaError, match=says):
        load(chat_model(tmp_path), **{"device": "cpu", **options})


def test_no_context_beyond_the_models_own_where_memory_is_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minisa.engine.free_memory", lambda _: 0)
    config = tiny_config(vocab_size=N_TOKENS, max_seq_len=100)
    assert load(loadable_hf(tmp_path, config), device="cpu").cache.length == 100


def test_in_inference_mode(tmp_path: Path) -> None:
    """Which is the caller's thread's own: those that read the weights are not in it."""
    path = chat_model(tmp_path)
    with torch.inference_mode():
        inside = load(path, device="cpu")
    outside = load(path, device="cpu")
    ids = list(range(9))
    assert torch.equal(inside.logits(ids), outside.logits(ids))
    found, expected = ([c.token for c in llm.generate(ids, max_new_tokens=5)] for llm in (inside, outside))
    assert found == expected


def test_a_template_counts_before_the_registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """models.toml names the format of what comes without one."""
    model = chat_model(tmp_path)
    monkeypatch.setattr("minisa.engine.resolve", lambda name: (model, find("llama3.2-1b-instruct")))
    assert load("a name", device="cpu").chat_template.name == f"the chat template of {model}"
    (model / "tokenizer_config.json").unlink()
    assert load("a name", device="cpu").chat_template.name == "llama3"
