"""bench.py as people use it: every flag, the record, the comparison with others, and being stopped half-way."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import bench
import minisa
from minisa import console, costs, measure
from minisa.benchmark import contender, report
from minisa.benchmark import run as benchmark_run
from minisa.config import RopeScaling
from minisa.sharing import SharingPlan
from tests.tiny import random_weights, tiny_config, write_gguf, write_hf
from tests.vocabularies import byte_level_json, gguf_byte_level

ROOT = Path(__file__).parents[1]
QUICK = ("--contexts", "0,20", "--prompt-lengths", "8,24", "--new-tokens", 3, "--repeats", 2, "--dtype", "fp32")
VOCABULARY = gguf_byte_level(byte_level_json())
CONFIG = tiny_config(vocab_size=len(VOCABULARY["tokenizer.ggml.tokens"]), tie_embeddings=True)
PLAN = SharingPlan.parse("1:2-3", CONFIG.n_layers)


class Ran(NamedTuple):
    status: int
    out: str
    err: str

    @property
    def record(self) -> dict[str, Any]:
        return json.loads(self.out.splitlines()[-1])

    def configuration(self, name: str) -> dict[str, Any]:
        return next(found for found in self.record["configurations"] if found["name"] == name)


Bench = Callable[..., Ran]


@pytest.fixture
def run_bench(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Bench:
    """run_bench(*flags): bench.py's main in this process, as the command line runs it; its workers are processes."""
    monkeypatch.setattr(measure, "last_level_cache", lambda device: 1 << 20)
    monkeypatch.setattr(measure, "LARGEST_MATRIX", 256)
    threads = torch.get_num_threads()

    def run(*flags: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["bench.py", *map(str, flags)])
        capfd.readouterr()
        try:
            with pytest.raises(SystemExit) as exit_:
                console.run(bench.main)
        finally:
            torch.set_num_threads(threads)
        sys.stdout.flush()
        out, err = capfd.readouterr()
        return Ran(exit_.value.code, out, err)  # type: ignore[arg-type]

    return run


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Workers that are no processes; the list of what they serve."""
    served = []

    class Inline:
        def __init__(self, name: str, factory: Callable[..., Any], *arguments: Any) -> None:
            self.served = factory(*arguments)
            served.append(self.served)

        def call(self, method: str, *arguments: Any) -> Any:
            return getattr(self.served, method)(*arguments)

        def close(self) -> None:
            pass

    monkeypatch.setattr(benchmark_run, "Worker", Inline)
    return served


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A loadable model of four layers with a tokenizer."""
    path = tmp_path_factory.mktemp("bench") / "tiny.gguf"
    return write_gguf(path, CONFIG, random_weights(CONFIG), metadata=VOCABULARY)


@pytest.fixture(scope="module")
def shape(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config.json of a model that nobody trained: another RoPE, an output head of its own."""
    config = tiny_config(rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 64), tie_embeddings=False)
    return write_hf(tmp_path_factory.mktemp("shape"), config, random_weights(config)) / "config.json"


class TestTheRecord:
    @pytest.fixture
    def ran(self, run_bench: Bench, tiny_gguf: Path) -> Ran:
        ran = run_bench("--model", tiny_gguf, "--sa", "1:2-3", *QUICK)
        assert ran.status == 0, ran.err
        return ran

    def test_has_what_its_docstring_promises(self, ran: Ran) -> None:
        record = ran.record
        assert (record["version"], record["interrupted"]) == (report.VERSION, False)
        assert record["model"] == {
            "name": "tiny.gguf", "random_weights": False, "layers": 4, "dim": 64, "max_seq_len": 128,
            "parameters": costs.parameter_count(CONFIG, SharingPlan.none(4)),
        }  # fmt: skip
        assert [c["name"] for c in record["configurations"]] == ["plain", "shared"]
        for configuration in record["configurations"]:
            assert configuration["load_seconds"] > 0 and configuration["first_token_seconds"] > 0
            assert configuration["peak_memory"] > configuration["memory_before_load"] > 1 << 20
            assert [(p["tokens"], p["rounds"]) for p in configuration["prefill"]] == [(8, 2), (24, 2)]
            assert [(d["context"], d["rounds"], d["steps"]) for d in configuration["decode"]] == [(0, 2, 6), (20, 2, 6)]
            for row in configuration["prefill"] + configuration["decode"]:
                speed = row["tokens_per_second"]
                assert 0 < speed["p10"] <= speed["median"] <= speed["p90"]
            for decode in configuration["decode"]:
                parts = dict(decode["bytes"])
                assert parts.pop("total") == sum(parts.values())
                speed = decode["bytes"]["total"] * decode["tokens_per_second"]["median"]
                assert decode["share_of_bandwidth"] == pytest.approx(speed / decode["bandwidth"])
                assert 0 < decode["share_of_best_bandwidth"] <= decode["share_of_bandwidth"]
                assert decode["allowed_tokens_per_second"] > 0
        for ceiling in ("read_bandwidth", "matrix_rate"):
            for when in ("start", "end"):
                found = record["ceiling"][ceiling][when]
                assert found["best"] >= found["median"] > 0
        documented = report.__doc__ or ""
        keys = {*record, *record["model"], *record["run"], *record["ceiling"], *record["shared_over_plain"]}
        for configuration in record["configurations"]:
            keys |= {*configuration, *configuration["prefill"][0], *configuration["decode"][0]}
        assert [key for key in keys if key not in documented] == []

    def test_sharing_is_compared_by_the_round_and_with_the_prediction(self, ran: Ran) -> None:
        against_plain = ran.record["shared_over_plain"]
        plain, shared = ran.configuration("plain"), ran.configuration("shared")
        assert shared["plan"] == str(PLAN) and shared["followers"] == 2
        assert against_plain["kv_bytes"] == {"ratio": 0.75, "predicted": 0.75}  # n/(2L) of it is saved
        assert against_plain["weight_bytes"]["ratio"] == pytest.approx(against_plain["weight_bytes"]["predicted"])
        for i, decode in enumerate(against_plain["decode"]):
            expected = plain["decode"][i]["bytes"]["total"] / shared["decode"][i]["bytes"]["total"]
            assert decode["predicted"] == expected > 1
            assert decode["p10"] <= decode["ratio"] <= decode["p90"]
        for i, prefill in enumerate(against_plain["prefill"]):
            assert prefill["predicted"] == plain["prefill"][i]["flops"] / shared["prefill"][i]["flops"] > 1

    def test_kv_bytes_measured_are_those_of_the_formula(self, ran: Ran) -> None:
        slots = ran.record["run"]["cache_slots"]
        for name, plan in (("plain", SharingPlan.none(4)), ("shared", PLAN)):
            configuration = ran.configuration(name)
            assert configuration["kv_bytes"] == costs.kv_bytes(CONFIG, plan, slots, 4)
            assert configuration["kv_bytes_match"] is True
        assert "MISMATCH" not in ran.out

    def test_a_person_reads_the_table(self, ran: Ran) -> None:
        lines = ran.out.splitlines()
        order = ["ceiling, ", "a decode step by formula", "load, s", "prefill of 8", "decode at 0", "decode at 20"]
        order += ["KV cache of 64 slots", "  by formula", "weights as stored", "peak memory"]
        places = [next(i for i, line in enumerate(lines) if line.startswith(start)) for start in order]
        assert places == sorted(places)
        decode = next(line for line in lines if line.startswith("decode at 20"))
        plain = ran.configuration("plain")["decode"][1]["tokens_per_second"]["median"]
        predicted = ran.record["shared_over_plain"]["decode"][1]["predicted"]
        assert f"{plain:,.1f}" in decode and decode.endswith(f"{predicted:.3f}")
        assert max(map(len, lines[:-1])) <= 120
        assert "decoding at 20" in ran.err  # progress


def test_a_disturbed_run_says_so(
    run_bench: Bench, shape: Path, in_this_process: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for slowest, told in ((0.015, False), (0.1, True)):
        monkeypatch.setattr(contender.Minisa, "decode", lambda self, context, steps, s=slowest: [0.01, s] * steps)
        ran = run_bench("--random-weights", shape, "--sa", "none", *QUICK)
        assert ("DISTURBED: some speeds swung by 10.0×" in ran.out) is told


def test_a_wrong_formula_is_reported(run_bench: Bench, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "kv_bytes", lambda *arguments: costs.kv_bytes(*arguments) - 2)
    ran = run_bench("--model", tiny_gguf, "--sa", "none", *QUICK)
    assert ran.configuration("plain")["kv_bytes_match"] is False
    assert "MISMATCH: the KV cache of plain takes 65,536 bytes, the formula says 65,534" in ran.out


class TestFlags:
    @pytest.fixture
    def quick(self, run_bench: Bench, tiny_gguf: Path, in_this_process: list[Any]) -> Bench:
        def run(*flags: object) -> Ran:
            ran = run_bench("--model", tiny_gguf, *QUICK, *flags)
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

    def test_default_lengths_end_with_the_model_s_context(self, run_bench: Bench, tiny_gguf: Path) -> None:
        plain = run_bench("--model", tiny_gguf, "--new-tokens", 1, "--repeats", 1).configuration("plain")
        assert [decode["context"] for decode in plain["decode"]] == [0]
        assert [prefill["tokens"] for prefill in plain["prefill"]] == [128]

    def test_new_tokens_and_repeats(self, quick: Bench) -> None:
        decode = quick("--new-tokens", 5, "--repeats", 3).configuration("plain")["decode"][1]
        assert (decode["rounds"], decode["steps"]) == (3, 15)

    def test_without_repeats_a_slow_model_gets_fewer_rounds(
        self, run_bench: Bench, tiny_gguf: Path, in_this_process: list[Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(benchmark_run, "LONGEST", 0)
        flags = [flag for flag in QUICK if flag not in ("--repeats", 2)]
        decode = run_bench("--model", tiny_gguf, *flags).configuration("plain")["decode"][0]
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
        self, run_bench: Bench, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A processor without instructions for bf16: torch multiplies it slowly, the C++ step by way of fp32."""
        rates = {torch.bfloat16: [1.0, 2.0, 3.0], torch.float32: [7.0, 8.0, 9.0]}
        monkeypatch.setattr(benchmark_run, "matrix_rates", lambda _, dtype: rates[dtype])
        ran = run_bench("--model", tiny_gguf, *QUICK, "--dtype", "bf16")
        assert ran.record["ceiling"]["matrix_rate"]["start"] == {"best": 9.0, "median": 8.0}

    def test_threads_are_everybody_s(self, run_bench: Bench, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        seen = []
        monkeypatch.setattr(
            benchmark_run, "matrix_rates", lambda *_: [float(seen.append(torch.get_num_threads()) or 1)]
        )
        monkeypatch.setattr(benchmark_run, "Minisa", OneThread)
        ran = run_bench("--model", tiny_gguf, *QUICK, "--threads", 1)
        assert ran.status == 0, ran.err
        assert seen == [1, 1]
        assert ran.record["run"]["threads"] == 1

    def test_random_weights_say_so(self, run_bench: Bench, shape: Path) -> None:
        ran = run_bench("--random-weights", shape, "--sa", "3", *QUICK)
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
        """It is begun in the background at first use, and would run beside what is measured."""
        config = tiny_config(head_dim=32)
        write_hf(tmp_path, config, random_weights(config))
        waits: list[bool] = []
        monkeypatch.setattr("minisa.runners.open_library", lambda *, wait: waits.append(wait))
        ran = run_bench("--random-weights", tmp_path / "config.json", *QUICK, "--dtype", "bf16", *flags)
        assert ran.status == 0, ran.err
        assert (True in waits) == waited

    def test_json_is_the_last_line(self, quick: Bench, tmp_path: Path) -> None:
        ran = quick("--json", tmp_path / "record.json")
        assert json.loads((tmp_path / "record.json").read_text()) == ran.record

    @pytest.mark.parametrize("sa", ["1:2-3", "none"])
    def test_plot_writes_a_png(self, sa: str, quick: Bench, tmp_path: Path) -> None:
        pytest.importorskip("matplotlib", reason='needs pip install "minisa[plots]"')
        quick("--sa", sa, "--plot", tmp_path / "plot.png")
        head = (tmp_path / "plot.png").read_bytes()
        assert head.startswith(b"\x89PNG\r\n") and len(head) > 10_000


class OneThread(contender.Minisa):
    """Refuses to be measured with more."""

    def prefill(self, tokens: list[int]) -> float:
        assert torch.get_num_threads() == 1
        return super().prefill(tokens)


BAD_FLAGS = {
    "--sa 9": "layer 9 is outside",
    "--device tpu": "--device 'tpu' is not a device",
    "--dtype int3": "--dtype 'int3' is not supported",
    "--kv-dtype int3": "--kv-dtype 'int3' is not supported",
    "--dtype bf16 --kv-dtype fp32": "--kv-dtype fp32: keys and values are computed in bf16; take it or fp8",
    "--quantize int2": "'int2' is not one of",
    "--batch 0": "--batch",
    "--contexts 5,x": "expected whole numbers from 0 on",
    "--contexts 127": "--contexts 127: the model's context has room for 112",
    "--prompt-lengths 0": "expected whole numbers from 1 on",
    "--prompt-lengths 200": "--prompt-lengths 200: the model's context has room for 128",
    "--new-tokens 129": "--new-tokens 129: the model's context has room for 128",
    "--new-tokens 0": "--new-tokens",
    "--repeats 0": "--repeats",
    "--threads 0": "--threads",
    "--random-weights smollm2-135m": "leave out --model",
    "--against vllm": "'vllm' is not one of",
    "--json no/such/folder.json": "there is no such folder",
    "--plot no/such/folder.png": "there is no such folder",
    "--wat": "No such option",
}


@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_bad_flags_get_one_line_and_status_2(
    flags: str, run_bench: Bench, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if flags.startswith("--plot"):
        monkeypatch.setattr(bench, "check_matplotlib", lambda: None)
    ran = run_bench("--model", tiny_gguf, *flags.split())
    assert (ran.status, ran.out) == (2, "")
    assert BAD_FLAGS[flags] in ran.err
    assert ran.err.count("\n") == 1 and ran.err.startswith("bench.py: ")


def test_an_unknown_shape_brings_up_near_ones(run_bench: Bench) -> None:
    ran = run_bench("--random-weights", "llama3-1b")
    assert ran.status == 2
    assert "llama3.2-1b" in ran.err


@pytest.mark.parametrize(
    ("flags", "package"),
    [("--plot x.png", "matplotlib"), ("--against transformers", "transformers"), ("--against llama.cpp", "llama")],
)
def test_packages_that_are_missing(
    flags: str, package: str, run_bench: Bench, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if package in name else find_spec(name, *rest)
    )
    ran = run_bench("--model", tiny_gguf, *flags.split())
    assert ran.status == 2
    assert "pip install" in ran.err and ran.err.count("\n") == 1


class TestAgainst:
    """On the same weights and in fp32 a fair comparison gives the same greedy tokens."""

    @pytest.mark.parametrize("model", ["--model", "--random-weights"])
    @pytest.mark.parametrize(
        ("peer", "packages"), [("transformers", ["transformers"]), ("llama.cpp", ["xllamacpp", "gguf"])]
    )
    def test_equal_greedy_tokens(
        self, peer: str, packages: list[str], model: str, run_bench: Bench, tiny_gguf: Path, shape: Path
    ) -> None:
        for package in packages:
            pytest.importorskip(package, reason='needs pip install "minisa[peers]"')
        path = tiny_gguf if model == "--model" else shape
        ran = run_bench(model, path, "--sa", "3", *QUICK, "--batch", 2, "--no-compile", "--against", peer)
        assert ran.status == 0, ran.err
        (found,) = ran.record["plain_over_peers"]
        assert (found["name"], found["same_greedy_tokens"], found["greedy_tokens"]) == (peer, 16, 16)
        configuration = ran.configuration(peer)
        for i, decode in enumerate(configuration["decode"]):
            assert decode["steps"] == 6 and decode["tokens_per_second"]["median"] > 0
            assert found["decode"][i]["ratio"] > 0
        assert all(prefill["ratio"] > 0 for prefill in found["prefill"])
        plain = ran.configuration("plain")["weight_bytes"]
        assert plain <= configuration["weight_bytes"] <= 1.01 * plain  # llama.cpp counts rotary factors in
        assert "plain ÷ it" in ran.out and peer in ran.out
        assert [c["name"] for c in ran.record["configurations"]] == ["plain", "shared", peer]

    def test_a_peer_that_computes_something_else_is_found_out(
        self, run_bench: Bench, tiny_gguf: Path, in_this_process: list[Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pytest.importorskip("transformers", reason='needs pip install "minisa[peers]"')
        from minisa.benchmark import transformers_peer

        monkeypatch.setattr(transformers_peer, "rope_frequencies", lambda config: torch.ones(config.head_dim // 2))
        ran = run_bench("--model", tiny_gguf, *QUICK, "--no-compile", "--against", "transformers")
        assert ran.record["plain_over_peers"][0]["same_greedy_tokens"] < 16

    def test_llama_cpp_needs_the_cpu_and_a_type_it_shares(self, tiny_gguf: Path, run_bench: Bench) -> None:
        pytest.importorskip("xllamacpp", reason='needs pip install "minisa[peers]"')
        ran = run_bench("--model", tiny_gguf, "--dtype", "fp16", "--against", "llama.cpp")
        assert ran.status == 2 and "leave out --dtype fp16" in ran.err


class TestBeingStopped:
    def test_ctrl_c_prints_what_is_done(
        self, run_bench: Bench, tiny_gguf: Path, in_this_process: list[Any], monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
    ) -> None:  # fmt: skip
        decode = contender.Minisa.decode

        def interrupted(self: contender.Minisa, context: int, steps: int) -> list[float]:
            if context == 20:
                raise KeyboardInterrupt
            return decode(self, context, steps)

        monkeypatch.setattr(contender.Minisa, "decode", interrupted)
        ran = run_bench("--model", tiny_gguf, "--sa", "3", *QUICK, "--json", tmp_path / "record.json")
        assert ran.status == 130
        assert ran.record["interrupted"] is True and "interrupted" in ran.out.rpartition("\n{")[0]
        assert json.loads((tmp_path / "record.json").read_text()) == ran.record
        done, missing = ran.configuration("shared")["decode"]
        assert done["tokens_per_second"]["median"] > 0 and missing["tokens_per_second"] is None
        assert ran.record["shared_over_plain"]["decode"][1]["ratio"] is None
        assert ran.record["ceiling"]["read_bandwidth"]["end"] is None

    def test_before_anything_was_measured(
        self, run_bench: Bench, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def interrupted(*_: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(benchmark_run, "ReadBandwidth", interrupted)
        ran = run_bench("--model", tiny_gguf, *QUICK)
        assert ran.status == 130
        assert ran.record["configurations"] == []

    def test_an_error_half_way_keeps_what_is_done(
        self, run_bench: Bench, tiny_gguf: Path, in_this_process: list[Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(self: contender.Minisa, context: int, steps: int) -> list[float]:
            raise minisa.MinisaError("out of memory")

        monkeypatch.setattr(contender.Minisa, "decode", full)
        ran = run_bench("--model", tiny_gguf, *QUICK)
        assert ran.status == 2 and ran.err.endswith("bench.py: out of memory\n")
        assert ran.configuration("plain")["prefill"][0]["rounds"] == 2

    def test_a_real_interrupt_ends_every_process_with_130(self, tiny_gguf: Path) -> None:
        """Ctrl-C on a terminal goes to the whole process group, workers too."""
        flags = ["--model", str(tiny_gguf), *map(str, QUICK), "--repeats", "1000000", "--threads", "1"]
        process = subprocess.Popen(
            [sys.executable, ROOT / "bench.py", *flags],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True,
        )  # fmt: skip
        try:
            assert process.stderr is not None
            for line in process.stderr:
                if line == "prefill of 8\n":
                    break
            time.sleep(0.1)
            os.killpg(process.pid, signal.SIGINT)
            out, err = process.communicate(timeout=60)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        assert process.returncode == 130
        assert "Traceback" not in err
        record = json.loads(out.splitlines()[-1])
        assert record["interrupted"] is True and record["configurations"][0]["prefill"][0]["rounds"] > 0
