"""Time and memory of a prompt's last tokens at growing lengths, for a model of Llama 3.1's shape, narrow:

    python -m tests.long_prompt [--way "C++ step"] [--lengths 8192,131072] [--tokens 512] [--heads 32]

The slots before them hold noise, which takes as long to attend to as text. Every line is a fresh process: the memory
is what it took at its peak beyond the model and the cache. Linux only.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import click
import torch

from minisa.benchmark.presets import PRESETS
from minisa.benchmark.synthetic import random_llm
from minisa.config import ModelConfig
from minisa.sharing import SharingPlan
from tests.memory import resident
from tests.tiny import tiny_config

LENGTHS = (8192, 16_384, 32_768, 65_536, 131_072)
WAYS = {"eager fp32": torch.float32, "eager bf16": torch.bfloat16, "C++ step": torch.bfloat16}
ROOT = Path(__file__).parents[1]


def narrow_llama(n_heads: int) -> ModelConfig:
    """Llama 3.1's context, rotary scaling and groups of heads."""
    return tiny_config(
        dim=256, n_heads=n_heads, n_kv_heads=max(n_heads // 4, 1), head_dim=32, hidden_dim=512, vocab_size=512,
        max_seq_len=131_072, rope_theta=500_000.0, rope_scaling=PRESETS["llama3.1-8b"].rope_scaling,
    )  # fmt: skip


def report(way: str, spans: str, length: int, n_tokens: int, n_heads: int) -> None:
    """In the fresh process: print the bytes beyond model and cache, and the seconds, that the last n_tokens took."""
    torch.set_num_threads(1)
    config = narrow_llama(n_heads)
    plan = SharingPlan.parse(spans, config.n_layers)
    llm = random_llm(
        config, plan, device=torch.device("cpu"), dtype=WAYS[way], max_seq_len=length, compile=way == "C++ step"
    )
    assert (llm.runner.name == "C++ step") == (way == "C++ step")
    noise = torch.randn(1 << 16, generator=torch.Generator().manual_seed(0))
    for memory in (llm.cache.keys, llm.cache.values):
        for part in memory.flatten().split(len(noise)):
            part.copy_(noise[: len(part)])
    tokens = torch.zeros(1, n_tokens, dtype=torch.int64)
    with torch.inference_mode():
        llm.runner.prefill(tokens, 0, llm.cache)  # torch's own code is read on first use
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # what VmHWM has been is forgotten
        began = time.perf_counter()
        llm.runner.prefill(tokens, length - n_tokens, llm.cache)
    print(resident("VmHWM") - before, time.perf_counter() - began)


def measure(way: str, spans: str, length: int, n_tokens: int, n_heads: int) -> tuple[int, float]:
    """Bytes beyond model and cache, and seconds, that the last n_tokens of a prompt of some length take."""
    script = f"from tests.long_prompt import report; report({way!r}, {spans!r}, {length}, {n_tokens}, {n_heads})"
    command = [sys.executable, "-c", script]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT).stdout.split()
    return int(printed[0]), float(printed[1])


@click.command(help=__doc__)
@click.option("--lengths", default=",".join(map(str, LENGTHS)))
@click.option("--way", "ways", multiple=True, default=tuple(WAYS))
@click.option("--tokens", default=512)
@click.option("--heads", default=32)
def main(lengths: str, ways: tuple[str, ...], tokens: int, heads: int) -> None:
    for way in ways:
        for spans in ("none", "2-3"):
            for length in map(int, lengths.split(",")):
                memory, seconds = measure(way, spans, length, tokens, heads)
                took = f"{memory / 1e6:4.0f} MB  {seconds / tokens * 1e3:7.2f} ms a token"
                print(f"{way}  sa {spans}  {length:>7}  {took}", flush=True)


if __name__ == "__main__":
    main()
