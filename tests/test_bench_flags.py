"""bench.py as people use it: every flag, good and bad."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import bench
from minisa.benchmark import contender
from minisa.benchmark import run as benchmark_run
from minisa.benchmark.plot import save
from minisa.errors import MinisaError
from tests.bench_runs import PLAN, QUICK, Bench, Ran
from tests.tiny import random_weights, tiny_config, write_hf


class TestFlags:
    @pytest.fixture
    def quick(self, run_bench: Bench, bench_gguf: Path, in_this_process: list[Any]) -> Bench:
        def run(*flags: object) -> Ran:
            ran = run_bench("--model", bench_gguf, *QUICK, *flags)
            assert ran.status == 0, ran.err
            return ran

        return run

    def test_sa_none_measures_plain_alone_and_so_does_a_model_without_a_plan(self, quick: Bench) -> None:
        for flags in (("--sa", "none"), ()):
            ran = quick(*flags)
            assert [c["name"] for c in ran.record["configurations"]] == ["plain"]
            assert ran.record["shared_over_plain"] is None
            assert "plain attention only" in ran.out

    def test_sa_takes_a_plan_file(self, quick: Bench, tmp_path: Path) -> None:
        PLAN.save(tmp_path / "plan.json")
        assert quick("--sa", tmp_path / "plan.json").configuration("shared")["plan"] == str(PLAN)

    def test_dtype(self, quick: Bench, in_this_process: list[Any]) -> None:
        ran = quick("--dtype", "bf16", "--device", "cpu")
        assert in_this_process[0].llm.dtype == torch.bfloat16
        assert ran.record["run"]["dtype"] == "bf16"
        assert ran.configuration("plain")["weight_bytes"] == 2 * ran.record["model"]["parameters"]

    def test_batch(self, quick: Bench, in_this_process: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(contender, "timed", lambda work, device: (0.5, work()))
        monkeypatch.setattr(contender.Minisa, "decode", lambda _, context, steps: [0.5] * steps)
        ran = quick("--batch", 3)
        assert in_this_process[0].llm.cache.batch == 3
        decode, prefill = ran.configuration("plain")["decode"][0], ran.configuration("plain")["prefill"][0]
        assert decode["tokens_per_second"]["median"] == 6  # three rows in half a second
        assert prefill["tokens_per_second"]["median"] == 16  # one row of eight
        assert ran.configuration("plain")["kv_bytes_match"] is True

    def test_lengths_are_sorted_and_each_taken_once(self, quick: Bench) -> None:
        plain = quick("--contexts", "30,0,30", "--prompt-lengths", "9").configuration("plain")
        assert [decode["context"] for decode in plain["decode"]] == [0, 30]
        assert [prefill["tokens"] for prefill in plain["prefill"]] == [9]

    def test_default_lengths_end_with_the_model_s_context(self, run_bench: Bench, bench_gguf: Path) -> None:
        plain = run_bench("--model", bench_gguf, "--new-tokens", 1, "--repeats", 1).configuration("plain")
        assert [decode["context"] for decode in plain["decode"]] == [0]
        assert [prefill["tokens"] for prefill in plain["prefill"]] == [128]

    def test_new_tokens_and_repeats(self, quick: Bench) -> None:
        decode = quick("--new-tokens", 5, "--repeats", 3).configuration("plain")["decode"][1]
        assert (decode["rounds"], decode["steps"]) == (3, 15)

    def test_without_repeats_a_slow_model_gets_fewer_rounds(
        self, run_bench: Bench, bench_gguf: Path, in_this_process: list[Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(benchmark_run, "LONGEST", 0)
        flags = [flag for flag in QUICK if flag not in ("--repeats", 2)]
        decode = run_bench("--model", bench_gguf, *flags).configuration("plain")["decode"][0]
        assert decode["rounds"] == benchmark_run.LEAST_ROUNDS

    @pytest.mark.parametrize(("flags", "compiled"), [((), False), (("--no-compile",), False), (("--compile",), True)])
    def test_compile(
        self, flags: tuple[str, ...], compiled: bool, quick: Bench, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calls = []

        def spy(function: Any, **options: Any) -> Any:
            calls.append(function)
            return function

        monkeypatch.setattr(torch, "compile", spy)
        ran = quick(*flags)
        assert bool(calls) == compiled
        assert ran.record["run"]["compile"] == {(): None, ("--no-compile",): False, ("--compile",): True}[flags]

    def test_the_ceiling_of_a_narrow_dtype_is_not_under_that_of_fp32(
        self, run_bench: Bench, bench_gguf: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A processor without instructions for bf16: torch multiplies it slowly, the C++ step by way of fp32."""
        rates = {torch.bfloat16: [1.0, 2.0, 3.0], torch.float32: [7.0, 8.0, 9.0]}
        monkeypatch.setattr(benchmark_run, "matrix_rates", lambda _, dtype: rates[dtype])
        ran = run_bench("--model", bench_gguf, *QUICK, "--dtype", "bf16")
        assert ran.record["ceiling"]["matrix_rate"]["start"] == {"best": 9.0, "median": 8.0}

    def test_threads_are_everybody_s(self, run_bench: Bench, bench_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        seen = []
        monkeypatch.setattr(
            benchmark_run, "matrix_rates", lambda *_: [float(seen.append(torch.get_num_threads()) or 1)]
        )
        monkeypatch.setattr(benchmark_run, "Minisa", OneThread)
        ran = run_bench("--model", bench_gguf, *QUICK, "--threads", 1)
        assert ran.status == 0, ran.err
        assert seen == [1, 1]
        assert ran.record["run"]["threads"] == 1

    def test_random_weights_say_so(self, run_bench: Bench, untrained_shape: Path) -> None:
        ran = run_bench("--random-weights", untrained_shape, "--sa", "3", *QUICK)
        assert ran.status == 0, ran.err
        assert ran.record["model"]["random_weights"] is True
        assert "RANDOM WEIGHTS" in ran.out
        assert len(ran.record["configurations"]) == 2

    def test_random_weights_of_a_preset_have_its_shape_and_plan(self) -> None:
        settings = bench.Settings.resolve(model="", random_weights="SmolLM2-135M", dtype="bf16")
        assert (settings.name, settings.opening.config.dim, settings.opening.path) == ("smollm2-135m", 576, None)
        assert settings.shared is not None and settings.shared.followers
        assert settings.contexts == (0, 512, 1500, 4096) and settings.prompt_lengths == (128, 512, 2048)

    @pytest.mark.parametrize("kind", ["int8", "int4"])
    def test_quantize(self, kind: str, quick: Bench) -> None:
        ran = quick("--quantize", kind)
        assert ran.record["run"]["quantize"] == kind
        assert ran.configuration("plain")["weight_bytes"] < 1.5 * ran.record["model"]["parameters"]

    def test_kv_dtype(self, quick: Bench) -> None:
        wide, narrow = quick("--sa", "3"), quick("--sa", "3", "--kv-dtype", "fp8")
        assert (wide.record["run"]["kv_dtype"], narrow.record["run"]["kv_dtype"]) == ("fp32", "fp8")
        assert "keys and values fp8" in narrow.out
        for name in ("plain", "shared"):
            kept, of = narrow.configuration(name), wide.configuration(name)
            assert kept["kv_bytes"] * 4 == of["kv_bytes"]
            assert kept["kv_bytes_match"] is True

    @pytest.mark.parametrize(
        ("flags", "waited"), [((), True), (("--no-compile",), False), (("--dtype", "fp32"), False)]
    )
    def test_the_engine_s_own_build_is_waited_for(
        self, flags: tuple[str, ...], waited: bool, run_bench: Bench, in_this_process: list[Any], tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        """Before anything is measured, and only where it is used."""
        config = tiny_config(head_dim=32)
        write_hf(tmp_path, config, random_weights(config))
        built: list[None] = []
        monkeypatch.setattr("minisa.runners.choice.open_library", lambda: built.append(None))
        ran = run_bench("--random-weights", tmp_path / "config.json", *QUICK, "--dtype", "bf16", *flags)
        assert ran.status == 0, ran.err
        assert bool(built) == waited

    def test_json_is_the_last_line(self, quick: Bench, tmp_path: Path) -> None:
        ran = quick("--json", tmp_path / "record.json")
        assert json.loads((tmp_path / "record.json").read_text()) == ran.record

    @pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a disk that is full")
    def test_a_full_disk_leaves_the_record_before_and_this_one_on_stdout(
        self, run_bench: Bench, bench_gguf: Path, in_this_process: list[Any], tmp_path: Path
    ) -> None:
        file = tmp_path / "record.json"
        file.write_text("{}")
        (tmp_path / f"record.json.{os.getpid()}.part").symlink_to("/dev/full")
        ran = run_bench("--model", bench_gguf, *QUICK, "--json", file)
        assert ran.status == 2 and f"--json {file}: No space left" in ran.err
        assert file.read_text() == "{}"
        assert ran.configuration("plain")["prefill"][0]["rounds"] == 2

    def test_a_plot_that_cannot_be_written_comes_after_the_record(
        self, run_bench: Bench, bench_gguf: Path, in_this_process: list[Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*_: object) -> None:
            raise MinisaError("--plot x.png: No space left on device")

        monkeypatch.setattr(bench, "check_matplotlib", lambda: None)
        monkeypatch.setattr(bench, "plot", full)
        ran = run_bench("--model", bench_gguf, *QUICK, "--plot", "x.png")
        assert ran.status == 2 and ran.err.endswith("No space left on device\n")
        assert ran.configuration("plain")["prefill"][0]["rounds"] == 2

    @pytest.mark.parametrize("sa", ["1:2-3", "none"])
    def test_plot_writes_a_png(self, sa: str, quick: Bench, tmp_path: Path) -> None:
        pytest.importorskip("matplotlib", reason='needs pip install "minisa[plots]"')
        quick("--sa", sa, "--plot", tmp_path / "plot.png")
        head = (tmp_path / "plot.png").read_bytes()
        assert head.startswith(b"\x89PNG\r\n") and len(head) > 10_000


def test_a_dollar_in_a_plot_is_a_dollar(tmp_path: Path) -> None:
    """And no formula, which a name would seldom be; nor does the file's name choose its format."""
    matplotlib = pytest.importorskip("matplotlib.figure", reason='needs pip install "minisa[plots]"')
    figure = matplotlib.Figure(layout="constrained")
    figure.suptitle("$a^$")
    axes = figure.subplots()
    axes.set(title="$a_$", xlabel="$\\no$")
    axes.plot([0, 1], label="$^$")
    axes.legend()
    axes.annotate("${$", (0, 0))
    save(figure, str(tmp_path / "plot.xyz"))
    assert (tmp_path / "plot.xyz").read_bytes().startswith(b"\x89PNG\r\n")
    with pytest.raises(MinisaError, match=r"plot.png: No such file"):
        save(figure, str(tmp_path / "none" / "plot.png"))


def test_a_plot_of_a_name_that_is_no_text(tmp_path: Path) -> None:
    """As a file may have, which a plan or a model is then called by."""
    matplotlib = pytest.importorskip("matplotlib.figure", reason='needs pip install "minisa[plots]"')
    figure = matplotlib.Figure(layout="constrained")
    figure.suptitle(os.fsdecode(b"a\xff\x1b\n"))
    save(figure, str(tmp_path / "plot.png"))
    assert figure.get_suptitle() == "a??\n"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a disk that is full")
def test_a_full_disk_leaves_the_plot_before(tmp_path: Path) -> None:
    matplotlib = pytest.importorskip("matplotlib.figure", reason='needs pip install "minisa[plots]"')
    (tmp_path / "plot.png").write_bytes(b"before")
    (tmp_path / f"plot.png.{os.getpid()}.part").symlink_to("/dev/full")
    with pytest.raises(MinisaError, match=r"plot.png: No space left"):
        save(matplotlib.Figure(), str(tmp_path / "plot.png"))
    assert [file.name for file in tmp_path.iterdir()] == ["plot.png"]
    assert (tmp_path / "plot.png").read_bytes() == b"before"


class OneThread(contender.Minisa):
    """Refuses to be measured with more."""

    def prefill(self, tokens: list[int]) -> float:
        assert torch.get_num_threads() == 1
        return super().prefill(tokens)


BAD_FLAGS = {
    "--sa 9": "layer 9 is outside",
    "--device tpu": "--device 'tpu' is not a device",
    "--device meta": "--device 'meta' is not a device",
    "--dtype int3": "--dtype 'int3' is not supported",
    "--kv-dtype int3": "--kv-dtype 'int3' is not supported",
    "--dtype bf16 --kv-dtype fp32": "--kv-dtype fp32: keys and values are computed in bf16; take it or fp8",
    "--quantize int2": "'int2' is not one of",
    "--batch 0": "--batch",
    "--batch 100000000000000000000": "--batch",
    "--contexts 5,x": "expected whole numbers from 0 on",
    "--contexts 127": "--contexts 127: the model's context has room for 112",
    "--prompt-lengths 0": "expected whole numbers from 1 on",
    "--prompt-lengths 200": "--prompt-lengths 200: the model's context has room for 128",
    "--new-tokens 129": "--new-tokens 129: the model's context has room for 128",
    "--new-tokens 0": "--new-tokens",
    "--repeats 0": "--repeats",
    "--threads 0": "--threads",
    "--threads 100000000000000000000": "--threads",
    "--random-weights smollm2-135m": "leave out --model",
    "--against vllm": "'vllm' is not one of",
    "--json no/such/folder.json": "there is no such folder",
    "--plot no/such/folder.png": "there is no such folder",
    "--wat": "No such option",
}


@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_bad_flags_get_one_line_and_status_2(
    flags: str, run_bench: Bench, bench_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if flags.startswith("--plot"):
        monkeypatch.setattr(bench, "check_matplotlib", lambda: None)
    ran = run_bench("--model", bench_gguf, *flags.split())
    assert (ran.status, ran.out) == (2, "")
    assert BAD_FLAGS[flags] in ran.err
    assert ran.err.count("\n") == 1 and ran.err.startswith("bench.py: ")


def test_a_shape_that_is_none_is_named(run_bench: Bench, tmp_path: Path) -> None:
    file = tmp_path / "c.json"
    for content, says in (
        ('{"architectures": 5}', "architectures is 5"),
        ('{"architectures": ["LlamaForCausalLM"], "hidden_size": 64}', "lacks 'num_attention_heads'"),
    ):
        file.write_text(content)
        ran = run_bench("--random-weights", file)
        assert ran.status == 2
        assert ran.err.startswith(f"bench.py: {file}: ") and says in ran.err


def test_an_unknown_shape_brings_up_near_ones(run_bench: Bench) -> None:
    ran = run_bench("--random-weights", "llama3-1b")
    assert ran.status == 2
    assert "llama3.2-1b" in ran.err


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
