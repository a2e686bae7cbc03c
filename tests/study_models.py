"""The tiny models that tests of the studies share, and the study commands run on one of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from minisa import LLM, load
from minisa.cli import main
from tests.loadable import N_TOKENS, loadable_gguf, loadable_hf
from tests.tiny import tiny_config

STUDY_CONFIG = tiny_config(vocab_size=N_TOKENS, max_seq_len=2048, tie_embeddings=True, n_layers=4)
FIVE_LAYERS = tiny_config(n_layers=5, vocab_size=N_TOKENS, max_seq_len=64)
DEFAULTS: dict[str, dict[str, object]] = {
    "search": {"followers": 2, "calibration-tokens": 64, "held-out-tokens": 64},
    "refit": {"sa": "1:3", "tokens": 1600, "held-out-tokens": 320},
    "heal": {"sa": "1:3", "steps": 2, "held-out-tokens": 320},
}


@pytest.fixture(scope="module")
def study_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A loadable model of four layers whose tokens are bytes and a few merges."""
    return loadable_gguf(tmp_path_factory.mktemp("eval") / "tiny.gguf", STUDY_CONFIG)


@pytest.fixture(scope="module")
def study_llm(study_gguf: Path) -> LLM:
    return load(study_gguf, dtype="fp32", device="cpu", max_seq_len=1, compile=False)


@pytest.fixture(scope="session")
def study_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of five layers with a byte-level tokenizer; two texts, a.txt and b.txt, beside its folder."""
    folder = loadable_hf(tmp_path_factory.mktemp("study") / "tiny", FIVE_LAYERS)
    generator = torch.Generator().manual_seed(0)
    for name in ("a.txt", "b.txt"):
        letters = torch.randint(97, 123, (3000,), generator=generator).tolist()
        (folder.parent / name).write_bytes(bytes(letters))
    return folder


def invoke(command: str, folder: Path, out: Path, *flags: object, **changes: object) -> Any:
    """A study command on the study_folder with options changed; None leaves one out. flags come last."""
    options: dict[str, object] = {"model": folder, "text": folder.parent / "a.txt", "length": 16, "device": "cpu"}
    options |= DEFAULTS[command] | {"out": out} | {name.replace("_", "-"): value for name, value in changes.items()}
    arguments = [str(part) for name, value in options.items() if value is not None for part in (f"--{name}", value)]
    return CliRunner().invoke(main, [command, *arguments, *map(str, flags)])


def made(command: str, folder: Path, out: Path, *flags: object, **changes: object) -> dict[str, Any]:
    """What the plan file says of how it was made."""
    ran = invoke(command, folder, out, *flags, **changes)
    assert ran.exit_code == 0, (ran.output, ran.exception)
    record: dict[str, Any] = json.loads(out.read_text())["made"]
    return record


def another_of_its_name(folder: Path, tmp_path: Path) -> Path:
    """The checkpoint in a folder of the same name, its last weight another."""
    copy = shutil.copytree(folder, tmp_path / "another" / folder.name)
    file = copy / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    return copy
