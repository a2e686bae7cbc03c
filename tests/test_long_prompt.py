"""What a prompt of 128k tokens takes beyond the model and the cache, in fresh processes. Linux only."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

# A model of Llama 3.1's context, rotary scaling and groups of heads, narrow. The slots before its prompt's last tokens
# hold noise, which takes as long to attend to as text.
LAST_TOKENS = """
import sys
from pathlib import Path
import torch
from minisa.benchmark.presets import PRESETS
from minisa.benchmark.synthetic import random_llm
from minisa.sharing import SharingPlan
from tests.memory import resident
from tests.tiny import tiny_config

runner, spans, length, n_tokens, n_heads = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
torch.set_num_threads(1)
config = tiny_config(
    dim=256, n_heads=n_heads, n_kv_heads=max(n_heads // 4, 1), head_dim=32, hidden_dim=512, vocab_size=512,
    max_seq_len=131_072, rope_theta=500_000.0, rope_scaling=PRESETS["llama3.1-8b"].rope_scaling,
)
native = runner == "C++ step"
dtype = torch.bfloat16 if native else torch.float32
plan = SharingPlan.parse(spans, config.n_layers)
llm = random_llm(config, plan, device="cpu", dtype=dtype, max_seq_len=length, compile=native)
assert llm.runner.name == runner
noise = torch.randn(1 << 16, generator=torch.Generator().manual_seed(0))
for memory in (llm.cache.keys, llm.cache.values):
    for part in memory.flatten().split(len(noise)):
        part.copy_(noise[: len(part)])
tokens = torch.zeros(1, n_tokens, dtype=torch.int64)
with torch.inference_mode():
    llm.runner.prefill(tokens, 0, llm.cache)  # torch's own code is read on first use
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # what VmHWM has been is forgotten
    llm.runner.prefill(tokens, length - n_tokens, llm.cache)
print(resident("VmHWM") - before)
"""


def memory_of(runner: str, spans: str, n_tokens: int, n_heads: int) -> int:
    """Bytes beyond model and cache that the last n_tokens of the prompt take."""
    command = [sys.executable, "-c", LAST_TOKENS, runner, spans, *map(str, (131_072, n_tokens, n_heads))]
    root = Path(__file__).parents[1]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=root).stdout)


@pytest.mark.parametrize(("spans", "most"), [("none", 40e6), ("2-3", 160e6)])
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_the_step_keeps_its_rows_of_attention_weights_few(spans: str, most: float) -> None:
    """64 of them for each of 32 heads would be a gigabyte."""
    assert memory_of("C++ step", spans, n_tokens=64, n_heads=32) < most


def test_the_mask_of_a_chunk_in_eager_mode() -> None:
    """512 tokens' as floats would be 268 MB by itself."""
    assert memory_of("eager", "2-3", n_tokens=512, n_heads=1) < 250e6
