"""The tiny models that tests of the studies share."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from minisa import LLM, load
from tests.loadable import N_TOKENS, loadable_gguf
from tests.tiny import tiny_config

STUDY_CONFIG = tiny_config(vocab_size=N_TOKENS, max_seq_len=2048, tie_embeddings=True, n_layers=4)


@pytest.fixture(scope="module")
def study_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A loadable model of four layers whose tokens are bytes and a few merges."""
    return loadable_gguf(tmp_path_factory.mktemp("eval") / "tiny.gguf", STUDY_CONFIG)


@pytest.fixture(scope="module")
def study_llm(study_gguf: Path) -> LLM:
    return load(study_gguf, dtype="fp32", device="cpu", max_seq_len=1, compile=False)


def another_of_its_name(folder: Path, tmp_path: Path) -> Path:
    """The checkpoint in a folder of the same name, its last weight another."""
    copy = shutil.copytree(folder, tmp_path / "another" / folder.name)
    file = copy / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    return copy
