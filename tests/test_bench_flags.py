"""bench.py as people use it: every flag, good and bad."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from minisa.benchmark import contender, measure, plot
from minisa.benchmark import run as benchmark_run
from minisa.benchmark.settings import choose
from minisa.errors import MinisaError
from tests.bench_runs import PLAN, QUICK, Bench, Ran


class TestFlags:
    @pytest.fixture
    def quick(self, run_bench: Bench, bench_gguf: Path, in_this_process: list[Any]) -> Bench:
        def run(*flags: object) -> Ran:
            ran = run_bench("--model", bench_gguf, *QUICK, *flags)
            assert ran.status == 0, ran.err
            return ran

        return run

    def test_sa(self, quick: Bench, tmp_path: Path) -> None:
        """none, or a model without a plan: plain alone; a plan's file."""
        for flags in (("--sa", "none"), ()):
            ran = quick(*flags)
            assert [it["name"] for it in ran.record["configurations"]] == ["plain"]
            assert "plain attention only" in ran.out
        PLAN.save(tmp_path / "plan.json")
        assert quick("--sa", tmp_path / "plan.json").configuration("shared")["plan"] == str(PLAN)

    def test_dtype_and_kv_dtype(self, quick: Bench) -> None:
        wide = quick("--sa", "3", "--dtype", "bf16", "--device", "cpu")
        narrow = quick("--sa", "3", "--dtype", "bf16", "--kv-dtype", "fp8")
        assert wide.record["run"]["dtype"] == narrow.record["run"]["dtype"] == "bf16"
        assert (wide.record["run"]["kv_dtype"], narrow.record["run"]["kv_dtype"]) == ("bf16", "fp8")
        assert wide.configuration("plain")["weight_bytes"] == 2 * wide.record["model"]["parameters"]
        assert "keys and values fp8" in narrow.out
        for name in ("plain", "shared"):
            kept = narrow.configuration(name)
            assert 2 * kept["kv_bytes"] == 2 * kept["kv_bytes_by_formula"] == wide.configuration(name)["kv_bytes"]

    @pytest.mark.parametrize("kind", ["int8", "int4"])
    def test_quantize(self, kind: str, quick: Bench) -> None:
        ran = quick("--quantize", kind)
        assert ran.record["run"]["quantize"] == kind
        assert ran.configuration("plain")["weight_bytes"] < 1.5 * ran.record["model"]["parameters"]

    def test_batch(self, quick: Bench, in_this_process: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(contender.Minisa, "prefill", lambda *_: 0.5)
        monkeypatch.setattr(contender.Minisa, "decode", lambda _, context, steps: [0.5] * steps)
        ran = quick("--batch", 3)
        assert in_this_process[0].llm.cache.batch == 3
        assert ran.cells("plain", "decode")[0]["tokens_per_second"]["median"] == 6  # three rows in half a second
        assert ran.cells("plain", "prefill")[0]["tokens_per_second"]["median"] == 16  # one row of eight
        assert ran.configuration("plain")["kv_bytes"] == ran.configuration("plain")["kv_bytes_by_formula"]

    def test_lengths_new_tokens_and_repeats(self, quick: Bench) -> None:
        lengths = ("--contexts", "30,0,30", "--prompt-lengths", "9")
        ran = quick(*lengths, "--new-tokens", 5, "--repeats", 3)
        assert [cell["tokens"] for cell in ran.cells("plain", "prefill")] == [9]
        found = [(cell["tokens"], cell["rounds"], cell["steps"]) for cell in ran.cells("plain", "decode")]
        assert found == [(0, 3, 15), (30, 3, 15)]

    def test_by_default_lengths_and_rounds_are_what_the_model_has_room_and_time_for(
        self, run_bench: Bench, bench_gguf: Path, in_this_process: list[Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(measure, "MAX_SECONDS", 0)
        ran = run_bench("--model", bench_gguf, "--new-tokens", 1)
        (decode,), (prefill,) = ran.cells("plain", "decode"), ran.cells("plain", "prefill")
        assert (decode["tokens"], prefill["tokens"], decode["rounds"]) == (0, 128, measure.MIN_ROUNDS)

    @pytest.mark.parametrize(("flag", "compiled"), [(None, None), ("--no-compile", False), ("--compile", True)])
    def test_compile(
        self, flag: str | None, compiled: bool | None, quick: Bench, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calls = []
        monkeypatch.setattr(torch, "compile", lambda function, **_: calls.append(function) or function)
        ran = quick(*([flag] if flag else []))
        assert bool(calls) == bool(compiled) and ran.record["run"]["compile"] is compiled

    def test_threads_and_the_ceiling_of_a_processor_without_bf16(
        self, quick: Bench, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """torch then multiplies bf16 slowly, the C++ step by way of fp32."""
        seen = []

        def rates(_: torch.device, dtype: torch.dtype) -> list[float]:
            seen.append(torch.get_num_threads())
            return {torch.bfloat16: [1.0, 2.0, 3.0], torch.float32: [7.0, 8.0, 9.0]}[dtype]

        monkeypatch.setattr(benchmark_run, "matrix_rates", rates)
        ran = quick("--dtype", "bf16", "--threads", 1)
        assert ran.record["ceiling"]["start"]["matrix_rate"] == {"best": 9.0, "median": 8.0}
        assert set(seen) == {1} and ran.record["run"]["threads"] == 1

    def test_random_weights(self, run_bench: Bench, untrained_shape: Path, in_this_process: list[Any]) -> None:
        ran = run_bench("--random-weights", untrained_shape, "--sa", "3", *QUICK)
        assert ran.status == 0, ran.err
        assert ran.record["model"]["random_weights"] is True and "RANDOM WEIGHTS" in ran.out
        settings = choose(random_weights="SmolLM2-135M", dtype="bf16")
        assert (settings.name, settings.opening.config.dim, settings.opening.path) == ("smollm2-135m", 576, None)
        assert settings.shared is not None and settings.shared.followers
        assert settings.contexts == (0, 512, 1500, 4096) and settings.prompt_lengths == (128, 512, 2048)

    def test_json_and_plot(self, quick: Bench, tmp_path: Path) -> None:
        pytest.importorskip("matplotlib", reason='needs pip install "minisa[plots]"')
        ran = quick("--sa", "3", "--json", tmp_path / "record.json", "--plot", tmp_path / "plot.png")
        assert json.loads((tmp_path / "record.json").read_text()) == ran.record
        head = (tmp_path / "plot.png").read_bytes()
        assert head.startswith(b"\x89PNG\r\n") and len(head) > 10_000

    def test_help_does_not_import_torch(self) -> None:
        """Unless what it shares with other command lines does."""
        code = "import sys, minisa.console; before = 'torch' in sys.modules; import bench; "
        code += "assert before or 'torch' not in sys.modules"
        subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


def test_a_plot_is_a_png_whose_dollars_are_dollars(tmp_path: Path) -> None:
    figure = pytest.importorskip("matplotlib.figure", reason='needs pip install "minisa[plots]"').Figure()
    figure.suptitle("$a^$")
    figure.subplots().set(title="$a_$", xlabel="$\\no$")
    plot.save(figure, str(tmp_path / "plot.xyz"))
    assert (tmp_path / "plot.xyz").read_bytes().startswith(b"\x89PNG\r\n")
    with pytest.raises(MinisaError, match=r"plot.png: No such file"):
        plot.save(figure, str(tmp_path / "none" / "plot.png"))


BAD_FLAGS = {
    "--sa 9": "layer 9 is outside",
    "--device tpu": "--device 'tpu' is not a device",
    "--dtype int3": "--dtype 'int3' is not supported",
    "--kv-dtype int3": "--kv-dtype 'int3' is not supported",
    "--dtype bf16 --kv-dtype fp32": "--kv-dtype fp32: ",
    "--quantize int2": "'int2' is not one of",
    "--batch 0": "--batch",
    "--contexts 5,x": "expected whole numbers from 0 on",
    "--contexts 127": "--contexts 127: the model's context has room for 112",
    "--prompt-lengths 0": "expected whole numbers from 1 on",
    "--prompt-lengths 200": "--prompt-lengths 200: the model's context has room for 128",
    "--new-tokens 129": "--new-tokens 129: the model's context is 128 tokens",
    "--repeats 0": "--repeats",
    "--threads 100000000000000000000": "--threads",
    "--random-weights smollm2-135m": "leave out --model",
    "--against vllm": "'vllm' is not one of",
    "--json no/such/folder.json": "folder",
    "--wat": "No such option",
}


@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_bad_flags_get_one_line_and_status_2(
    flags: str, run_bench: Bench, bench_gguf: Path, in_this_process: list[Any]
) -> None:
    ran = run_bench("--model", bench_gguf, *flags.split())
    assert (ran.status, ran.out) == (2, "")
    assert BAD_FLAGS[flags] in ran.err
    assert ran.err.splitlines()[-1].startswith("bench.py: ") and "Traceback" not in ran.err


@pytest.mark.parametrize(
    ("shape", "content", "says"),
    [
        ("c.json", '{"architectures": ["Bert"]}', "Bert"),
        ("c.json", '{"architectures": ["LlamaForCausalLM"], "hidden_size": 64}', "num_attention_heads"),
        ("llama3-1b", "", "llama3.2-1b"),
    ],
)
def test_a_shape_that_is_none(shape: str, content: str, says: str, run_bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text(content)
    ran = run_bench("--random-weights", tmp_path / shape if content else shape)
    assert ran.status == 2 and ran.err.count("\n") == 1
    assert shape in ran.err and says in ran.err


@pytest.mark.parametrize(
    ("flags", "package"),
    [("--plot x.png", "matplotlib"), ("--against transformers", "transformers"), ("--against llama.cpp", "llama")],
)
def test_packages_that_are_missing(
    flags: str, package: str, run_bench: Bench, bench_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if package in name else find_spec(name, *rest)
    )
    ran = run_bench("--model", bench_gguf, *flags.split())
    assert ran.status == 2
    assert "pip install" in ran.err and ran.err.count("\n") == 1
