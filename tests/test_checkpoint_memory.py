"""Loading takes the model's memory and little more, measured in fresh processes. Linux only."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from minisa.checkpoint import load_weights, open_checkpoint
from minisa.config import ModelConfig
from tests.memory import resident
from tests.tiny import empty_model, random_weights, tiny_config, write_gguf, write_hf, write_meta

LARGER = tiny_config(dim=1024, n_layers=2, n_heads=16, n_kv_heads=4, head_dim=64, hidden_dim=4096, vocab_size=4096)

FORMATS: dict[str, Callable[[Path, ModelConfig], Path]] = {
    "safetensors": lambda path, config: write_hf(path, config, random_weights(config), dtype=torch.bfloat16),
    "pth": lambda path, config: write_meta(path, config, random_weights(config), shards=2, dtype=torch.bfloat16),
    "gguf": lambda path, config: write_gguf(path / "m.gguf", config, random_weights(config), type="Q4_1"),
}


def report_peak(warm_up: Path, path: Path, dtype: torch.dtype) -> None:
    """In the fresh process: open, load, print how far memory rose and what the model takes.

    A tiny checkpoint is loaded first: the pages of torch's own code, read on first use, are not the loader's.
    """
    for file in (warm_up, path):
        before = resident("VmRSS")
        checkpoint = open_checkpoint(file)
        model = empty_model(checkpoint.config)
        load_weights(model, checkpoint, device="cpu", dtype=dtype)
    print(resident("VmHWM") - before, sum(parameter.nbytes for parameter in model.parameters()))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("format", "dtype"),
    [("safetensors", "bfloat16"), ("pth", "bfloat16"), ("gguf", "bfloat16"), ("gguf", "float32")],
)
def test_peak_memory(format: str, dtype: str, tmp_path: Path) -> None:
    """77 MB of bf16, or 24 MB of Q4_1, never take 15% more than the model they become."""
    warm_up, larger = (FORMATS[format](tmp_path / str(config.dim), config) for config in (tiny_config(), LARGER))
    command = [sys.executable, "-m", "tests.test_checkpoint_memory", str(warm_up), str(larger), dtype]
    output = subprocess.run(command, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, check=True).stdout
    rise, size = map(int, output.split())
    assert 0.9 * size < rise < 1.15 * size


if __name__ == "__main__":
    report_peak(Path(sys.argv[1]), Path(sys.argv[2]), getattr(torch, sys.argv[3]))
