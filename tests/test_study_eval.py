"""python -m minisa eval: tables, records, flags."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from minisa import LLM, cli, load
from minisa.sharing import SharingPlan
from minisa.study.variants import opened, parse_variants
from tests.commands import Ran
from tests.engines import llm_of
from tests.loadable import N_TOKENS, loadable_gguf, loadable_hf
from tests.models import SIX_LAYERS
from tests.study_rows import ROWS, some_text, write_data
from tests.tiny import tiny_config

Run = Callable[..., Ran]
NEEDS_LM_EVAL = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason='needs "minisa[eval]"')


@pytest.fixture
def run_eval(run_main: Run, study_gguf: Path) -> Run:
    """run_eval(*flags): `python -m minisa eval` on the tiny model, in this process."""
    return lambda *flags: run_main(cli.main, "minisa", "eval", "--model", study_gguf, "--device", "cpu", *flags)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(some_text(600, 9))
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = [
        {"goal": some_text(5 + i, i), "sol1": some_text(3, 50 + i), "sol2": some_text(4, 70 + i), "label": i % 2}
        for i in range(12)
    ]
    return write_data(tmp_path / "data", "piqa", *rows)


def rows_of(ran: Ran, json_file: Path) -> list[dict[str, Any]]:
    assert ran.status == 0, ran.err
    return json.loads(json_file.read_text())["variants"]


@NEEDS_LM_EVAL
def test_plans_and_baselines_in_one_table_for_each_benchmark(
    run_eval: Run, text: Path, data: Path, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib", reason='needs pip install "minisa[plots]"')
    ran = run_eval(
        *("--perplexity", text, "--length", 64, "--tasks", "piqa", "--data", data, "--sa", "2", "--sa", "1:2-3"),
        *("--baseline", "drop:2", "--baseline", "cla:1:3", "--baseline", "kv-int8", "--baseline", "sa:2+kv-int8"),
        *("--json", tmp_path / "r.json", "--plot", tmp_path / "r.png"),
    )
    rows = rows_of(ran, tmp_path / "r.json")
    names = ["plain", "2", "1:2-3", "drop:2", "cla:1:3", "kv-int8", "sa:2+kv-int8"]
    assert [row["variant"] for row in rows] == names
    assert [row["kind"] for row in rows] == ["plain", "sa", "sa", "drop", "cla", "kv-int8", "sa+kv-int8"]
    assert [row["kv_saved"] for row in rows] == pytest.approx(
        [0, 1 / 8, 2 / 8, 1 / 4, 1 / 4, 1 - 18 / 32, 1 - 7 / 8 * 18 / 32]
    )
    perplexities = [row["benchmarks"]["perplexity"]["perplexity"] for row in rows]
    for found in perplexities[1:]:
        assert found["ratio"] == pytest.approx(found["value"] / perplexities[0]["value"])
        assert found["ratio"] != 1 and found["ratio_stderr"] > 0
    accuracies = [row["benchmarks"]["piqa"]["acc"] for row in rows]
    for found in accuracies:
        assert found["difference"] == pytest.approx(found["value"] - accuracies[0]["value"])
    lines = ran.out.splitlines()
    assert [line.split()[0] for line in lines[2:9]] == [line.split()[0] for line in lines[11:]] == names
    assert f"{perplexities[1]['ratio']:.3f} ± {perplexities[1]['ratio_stderr']:.3f}" in lines[3]
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")


def test_perplexity_is_the_mean_loss_of_the_windows(run_eval: Run, text: Path, study_llm: LLM, tmp_path: Path) -> None:
    def values(*flags: object) -> list[float]:
        ran = run_eval("--perplexity", text, "--length", 50, "--limit", 3, "--json", tmp_path / "r.json", *flags)
        rows = rows_of(ran, tmp_path / "r.json")
        return [row["benchmarks"]["perplexity"]["perplexity"]["value"] for row in rows]

    ids = study_llm.tokenizer.encode(text.read_text())
    losses = []
    for start in (0, 50, 100):
        log_p = study_llm.logits(ids[start : start + 50]).log_softmax(-1)
        losses += [-log_p[t - 1, ids[start + t]].item() for t in range(1, 50)]
    (found,) = values("--dtype", "fp32")
    assert found == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    (rounded,), (quantized,) = values("--dtype", "bf16"), values("--dtype", "fp32", "--quantize", "int4")
    assert rounded == pytest.approx(found, rel=0.05)
    assert len({found, rounded, quantized}) == 3


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_what_answers_is_measured_as_it_runs(run_eval: Run, text: Path, tmp_path: Path) -> None:
    """Weights and activations in eight bits, keys and values in fp8: by no numbers but the C++ step's."""
    config = tiny_config(vocab_size=N_TOKENS, n_heads=2, n_kv_heads=1, head_dim=32)
    model = loadable_gguf(tmp_path / "wide.gguf", config)

    def values(*more: object) -> list[float]:
        flags = ("--model", model, "--perplexity", text, "--length", 100, "--limit", 2, "--sa", "1", *more)
        rows = rows_of(run_eval(*flags, "--json", tmp_path / "r.json"), tmp_path / "r.json")
        return [row["benchmarks"]["perplexity"]["perplexity"]["value"] for row in rows]

    def expected(sa: str | None) -> float:
        llm = load(model, sa=sa, device="cpu", max_seq_len=1, compile=True, quantize="int8", kv_dtype="fp8")
        assert llm.runner.name == "C++ step"
        ids = torch.tensor(llm.tokenizer.encode(text.read_text())[:200]).view(2, 100)
        log_p = torch.stack([llm.logits(window.tolist()) for window in ids]).log_softmax(-1)
        return math.exp(-log_p[:, :-1].gather(-1, ids[:, 1:, None]).double().mean().item())

    as_run = values("--quantize", "int8", "--as-run", "--kv-dtype", "fp8")
    assert as_run == pytest.approx([expected(None), expected("1")], rel=1e-6)
    others = values("--quantize", "int8", "--as-run") + values("--quantize", "int8")
    assert min(abs(one / other - 1) for one in as_run for other in others) > 1e-5


@NEEDS_LM_EVAL
def test_texts_that_are_cut_are_counted_and_unknown_tokens_refused(run_eval: Run, tmp_path: Path) -> None:
    data = write_data(tmp_path / "data", "piqa", ROWS["piqa"], ROWS["piqa"] | {"goal": some_text(700, 1)})
    ran = run_eval("--tasks", "piqa", "--data", data)
    assert ran.status == 0 and "piqa: 2 texts are cut to fit the model's context" in ran.err
    folder = loadable_hf(tmp_path / "small", tiny_config(vocab_size=70, max_seq_len=64))
    ran = run_eval("--tasks", "piqa", "--data", data, "--model", folder)
    assert ran.status == 2 and "encoded by the model's tokenizer, has token id" in ran.err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--tasks", "piqa"), "give --perplexity FILE, or --tasks with --data FOLDER"),
        (("--sa", "2"), "give --perplexity FILE, or --tasks with --data FOLDER"),
        (("--perplexity", "no.txt"), "no.txt: cannot read"),
        (("--perplexity", "TEXT", "--as-run", "--baseline", "kv-int8"), "--as-run: for --perplexity and gsm8k"),
        (("--perplexity", "TEXT", "--kv-dtype", "fp8"), "--kv-dtype fp8: goes with --as-run"),
        (("--perplexity", "TEXT", "--limit", 0), "0 is not in the range x>=1"),
        (("--perplexity", "TEXT", "--sa", "9"), "layer 9 is outside the model"),
        (("--perplexity", "TEXT", "--sa", "2", "--sa", "2"), "2 is there twice"),
        (("--perplexity", "TEXT", "--baseline", "sa:2+drop:1"), "drop"),
        (("--perplexity", "TEXT", "--json", "no/such/r.json"), "no/such/r.json: expected a file in a folder"),
        (("--perplexity", "TEXT", "--model", "no-such-model"), "no-such-model"),
        pytest.param(("--tasks", "piqa", "--data", "DATA", "--as-run"), "--as-run: for --perp", marks=NEEDS_LM_EVAL),
        pytest.param(("--tasks", "chess", "--data", "."), "'chess' is unknown", marks=NEEDS_LM_EVAL),
        pytest.param(("--tasks", "piqa", "--data", "none"), "none/piqa.jsonl: cannot read", marks=NEEDS_LM_EVAL),
    ],
)
def test_bad_flags_are_one_line_and_status_2(flags: Any, message: str, run_eval: Run, text: Path, data: Path) -> None:
    ran = run_eval(*({"TEXT": text, "DATA": data}.get(flag, flag) for flag in flags))
    assert ran.status == 2 and message in ran.err
    assert len(ran.err.strip().splitlines()) == 1


@pytest.mark.parametrize(("package", "flags"), [("lm_eval", ("--tasks", "piqa")), ("matplotlib", ("--plot", "r.png"))])
def test_a_missing_package_is_said_first(
    package: str, flags: tuple[str, ...], run_eval: Run, text: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == package else real(name, *rest))
    ran = run_eval("--perplexity", text, *flags, *(("--data", data) if package == "lm_eval" else ()))
    assert ran.status == 2 and 'pip install "minisa[' in ran.err


def test_one_model_in_memory_at_a_time_and_plain_first() -> None:
    alive: list[weakref.ref[LLM]] = []

    def load_one(sa: str | None) -> LLM:
        assert not any(reference() for reference in alive)
        llm = llm_of(SharingPlan.none(SIX_LAYERS.n_layers))
        alive.append(weakref.ref(llm))
        return llm

    names = []
    for variant, llm in opened(parse_variants(["2", "3"], ["drop:1"], SIX_LAYERS, None), load_one):
        names.append(variant.name)
        del llm
    assert names == ["plain", "drop:1", "2", "3"] and len(alive) == 3
