"""The state of work that was broken off: read back as it was, and only by the same command on the same model."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from minisa.errors import MinisaError
from minisa.study.resuming import fingerprint, read_state, write_state
from tests.loadable import N_TOKENS, loadable_hf
from tests.tiny import random_weights, tiny_config, write_gguf

CONFIG = tiny_config(n_layers=1, vocab_size=N_TOKENS, max_seq_len=64)
STATE: dict[str, Any] = {"measured": {((0, 0), (None, (1, 0))): 0.5}, "weights": {"wo": torch.ones(2, 3)}, "step": 3}


def test_a_state_is_read_back_by_the_same_settings_only(tmp_path: Path) -> None:
    file = tmp_path / "plan.json.search"
    assert read_state(file, {}) == {}
    write_state(file, {"seed": 0, "texts": ["a"]}, STATE)
    assert list(tmp_path.iterdir()) == [file]
    found = read_state(file, {"seed": 0, "texts": ["a"]})
    assert torch.equal(found["weights"].pop("wo"), torch.ones(2, 3))
    assert found == STATE | {"weights": {}}
    with pytest.raises(MinisaError, match="begun with seed 0, now it is 1: remove the file, or give another --out"):
        read_state(file, {"seed": 1, "texts": ["b"]})
    with pytest.raises(MinisaError, match="cannot keep the state"):
        write_state(tmp_path / "none" / "plan.json.search", {}, STATE)


@pytest.mark.parametrize(
    "content", [b"", b"no", pickle.dumps({"settings": {}, "state": {}}, 2), pickle.dumps(print, 2)]
)
def test_a_file_that_is_no_state_is_refused(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "plan.json.heal"
    file.write_bytes(content)
    with pytest.raises(MinisaError, match=r"plan.json.heal: not the state of this command: remove it"):
        read_state(file, {"seed": 0})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return loadable_hf(tmp_path / "one" / "tiny", CONFIG)


def test_a_fingerprint_is_of_the_checkpoint_s_files_not_of_their_place(folder: Path, tmp_path: Path) -> None:
    before = fingerprint(str(folder))
    (folder / "model.json").write_text("{}")
    (folder / "model.delta.safetensors").write_bytes(b"x")
    assert fingerprint(str(folder)) == before
    assert fingerprint(str(shutil.copytree(folder, tmp_path / "two" / "other"))) == before


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("model.safetensors", lambda old: old[:-1] + bytes([old[-1] ^ 1])),  # the last weight
        ("config.json", lambda old: old.replace(b"{", b"{ ", 1)),
        ("tokenizer_config.json", lambda old: b"{}"),
    ],
)
def test_every_file_changes_the_fingerprint(name: str, change: Any, folder: Path) -> None:
    before, file = fingerprint(str(folder)), folder / name
    file.write_bytes(change(file.read_bytes() if file.exists() else b""))
    assert fingerprint(str(folder)) != before


def test_gguf_files_have_fingerprints_of_their_own(tmp_path: Path) -> None:
    one, other = (write_gguf(tmp_path / f"{seed}" / "x.gguf", CONFIG, random_weights(CONFIG, seed)) for seed in (0, 1))
    assert fingerprint(str(one)) != fingerprint(str(other))
