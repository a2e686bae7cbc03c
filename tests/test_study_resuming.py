"""What tells the model that work was begun with from another of its name."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from minisa.errors import MinisaError
from minisa.study import resuming
from minisa.study.resuming import fingerprint
from tests.loadable import N_TOKENS, loadable_hf
from tests.tiny import random_weights, tiny_config, write_gguf

CONFIG = tiny_config(n_layers=1, vocab_size=N_TOKENS, max_seq_len=64)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return loadable_hf(tmp_path / "one" / "tiny", CONFIG)


def test_it_is_of_the_files_not_of_their_place_nor_of_what_lies_beside_them(folder: Path, tmp_path: Path) -> None:
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
        ("tokenizer.json", lambda old: old[:-20] + b" " + old[-20:]),  # within neither edge: its length tells
        ("tokenizer_config.json", lambda old: b"{}"),
    ],
)
def test_every_file_tells(name: str, change: object, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resuming, "EDGE", 16)
    before, file = fingerprint(str(folder)), folder / name
    file.write_bytes(change(file.read_bytes() if file.exists() else b""))  # type: ignore[operator]
    assert fingerprint(str(folder)) != before


def test_a_gguf_file_is_its_own(tmp_path: Path) -> None:
    one, other = (write_gguf(tmp_path / f"{seed}" / "x.gguf", CONFIG, random_weights(CONFIG, seed)) for seed in (0, 1))
    assert fingerprint(str(one)) != fingerprint(str(other))
    with pytest.raises(MinisaError, match="no such file"):
        fingerprint(str(tmp_path / "none.gguf"))
