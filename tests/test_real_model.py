"""What the default model must do: answer, share, and save the memory it says it saves."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from minisa import LLM, load
from minisa.costs import kv_bytes
from minisa.models.registry import DEFAULT_MODEL
from minisa.sharing import SharingPlan

pytestmark = pytest.mark.real_model

ROOT = Path(__file__).parents[1]
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


def answer(llm: LLM, **options: object) -> str:
    return "".join(chunk.text for chunk in llm.chat(QUESTION, max_new_tokens=40, **options))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "sa", [None, "default", "3:6,19:21,25:27,28:29"], ids=["plain", "default plan", "identity heads"]
)
def test_the_capital_of_france(smollm2_path: Path, sa: str | None, dtype: str) -> None:
    assert smollm2_path.exists()  # fetched; only its name stands for its own plan wherever it lies
    llm = load(DEFAULT_MODEL, sa=sa, dtype=dtype, max_seq_len=512)
    said = answer(llm)
    assert "Paris" in said
    assert "<|" not in said  # no special token is shown


@pytest.mark.parametrize(("format", "most"), [("int8", 144e6), ("int4", 97e6)])
def test_quantized_weights_stay_near(smollm2_path: Path, smollm2: LLM, format: str, most: float) -> None:
    """The file is Q4_1, so int4 loses nothing but what the C++ step rounds off activations."""
    llm = load(smollm2_path, quantize=format, device="cpu", max_seq_len=512)
    ids = smollm2.tokenizer.encode("The Seine flows through Paris, and the Thames through London. " * 8)
    found, exact = llm.logits(ids), smollm2.logits(ids)
    assert (found - exact).norm() / exact.norm() < 0.05
    if shutil.which("g++"):  # else eager PyTorch, which keeps int4 in bytes
        assert llm.runner.name == "C++ step"
        assert llm.weight_bytes < most


def test_it_stops_by_itself(smollm2: LLM) -> None:
    *_, last = smollm2.chat([{"role": "user", "content": "Say hello."}], max_new_tokens=200, stop_ids=None)
    assert last.finish_reason == "stop"
    assert last.token == smollm2.tokenizer.special["<|im_end|>"]


def test_four_questions_in_one_batch_are_four_questions_alone(smollm2: LLM) -> None:
    questions = ["Hi", "What is the capital of France?", "Count to ten.", "Write a line about the sea, then stop."]
    prompts = [smollm2.chat_template.ids([{"role": "user", "content": text}]) for text in questions]
    together = list(smollm2.generate(prompts, max_new_tokens=24))
    for row, prompt in enumerate(prompts):
        alone = [chunk.token for chunk in smollm2.generate(prompt, max_new_tokens=24)]
        assert [chunk.token for chunk in together if chunk.row == row] == alone


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_an_answer_in_bf16_is_its_own_in_any_company(smollm2_path: Path) -> None:
    """In the C++ step, to the last token, near ties and all: asked again, after a prefix, with guesses, in a batch."""
    llm = load(smollm2_path, device="cpu", dtype="bf16", max_seq_len=256, max_batch=8)
    assert llm.runner.name == "C++ step"
    topics = ["rain", "a sea", "bread", "winter", "a dog", "chess", "music", "trade"]
    chats = [[{"role": "user", "content": f"Explain how {topic} comes about."}] for topic in topics]
    prompts = [llm.chat_template.ids(messages) for messages in chats]

    def tokens(*prompts: list[int], **options: object) -> list[list[int]]:
        found: list[list[int]] = [[] for _ in prompts]
        for chunk in llm.generate([*prompts], max_new_tokens=24, **options):
            found[chunk.row].append(chunk.token)
        return found

    expected = [tokens(prompt)[0] for prompt in prompts]
    assert tokens(*prompts) == expected
    prefix = llm.prefix(prompts[0][:-3])
    for prompt, said in zip(prompts[:2], expected, strict=False):
        assert tokens(prompt, prefix=prefix) == tokens(prompt) == tokens(prompt, speculate=True) == [said]


def test_a_second_turn_computes_new_tokens_only(smollm2: LLM) -> None:
    said = answer(smollm2)
    follow_up = [*QUESTION, {"role": "assistant", "content": said}, {"role": "user", "content": "And of Italy?"}]
    *_, last = smollm2.chat(follow_up, max_new_tokens=3)
    assert last.stats is not None
    assert last.stats.prompt_tokens - last.stats.reused_tokens < 20


def test_chats_take_their_system_prompt_from_a_prefix(smollm2: LLM) -> None:
    system = {"role": "system", "content": "You answer in one short sentence. " * 8}
    prefix = smollm2.prefix([system])
    assert len(prefix.cache.tokens[0]) > 8 * 7
    found = []
    for given in (prefix, None):
        list(smollm2.generate("x", max_new_tokens=1))  # nothing of the chat is left in the cache
        found.append(list(smollm2.chat([system, *QUESTION], max_new_tokens=12, prefix=given)))
    assert [chunk.token for chunk in found[0]] == [chunk.token for chunk in found[1]]
    stats, without = (chunks[-1].stats for chunks in found)
    assert stats is not None and without is not None
    assert stats.reused_tokens == len(prefix.cache.tokens[0]) and without.reused_tokens < 3


RESIDENT = """
import json, sys
import torch
import minisa
from tests.memory import resident

torch.set_num_threads(1)
spans = sys.argv[2] if sys.argv[2] != "none" else None
llm = minisa.load(sys.argv[1], sa=spans, dtype="fp32", max_seq_len=8192)
before = resident("RssAnon")
llm.cache.keys.fill_(1.0)
llm.cache.values.fill_(1.0)
print(json.dumps({"weights": before, "cache": resident("RssAnon") - before, "counted": llm.cache.bytes()}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_resident_memory_of_a_shared_run_is_lower_by_the_formula(smollm2_path: Path) -> None:
    """Fresh processes, the whole cache in use: what the system says is resident follows costs.kv_bytes."""
    measured = {}
    for spans in ("none", "3:6,19:21,25:27,28:29", "11-28"):
        command = [sys.executable, "-c", RESIDENT, str(smollm2_path), spans]
        printed = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout
        measured[spans] = json.loads(printed)
    config = load(smollm2_path, max_seq_len=8).config
    for spans, found in measured.items():
        formula = kv_bytes(config, SharingPlan.parse(spans, 30), 8192, 4)
        assert found["counted"] == formula
        assert abs(found["cache"] - formula) < 2e6
    # 18 of 30 layers follow: their q and k projections are 18 · 576 · (9 + 3) · 64 weights of 4 bytes.
    saved = measured["none"]["weights"] - measured["11-28"]["weights"]
    assert abs(saved - 18 * 576 * 12 * 64 * 4) < 6e6


PREFILL = """
import sys
from dataclasses import replace
from pathlib import Path
import torch
from minisa.benchmark.presets import PRESETS
from minisa.sharing import SharingPlan
from minisa.benchmark.synthetic import random_llm
from minisa.text.tokenizer import load_tokenizer
from tests.memory import resident

config, plan = replace(PRESETS["smollm2-135m"], n_layers=6), SharingPlan.parse("2:3,4:5", 6)
llm = random_llm(config, plan, device="cpu", dtype=torch.bfloat16, max_seq_len=8192)
llm.tokenizer = load_tokenizer(Path(sys.argv[1]))
ids = torch.randint(49152, (8191,), generator=torch.Generator().manual_seed(0)).tolist()
loaded = resident("VmRSS")
next(llm.generate(ids, max_new_tokens=1))
print(resident("VmHWM") - loaded - llm.cache.bytes())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_prefill_of_8k_tokens_fits_in_model_and_cache_and_300_mb(smollm2_path: Path) -> None:
    """In six layers of its thirty, where no more is alive at a time. All logits would be 800 MB, all scores 1.2 GB."""
    command = [sys.executable, "-c", PREFILL, str(smollm2_path)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout
    assert int(printed) < 300e6
