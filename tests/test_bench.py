"""bench.py as people use it: the record, the comparison with others, and being stopped half-way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import minisa
from minisa import costs
from minisa.benchmark import contender, report
from minisa.benchmark import run as benchmark_run
from minisa.sharing import SharingPlan
from tests.bench_runs import CONFIG, PLAN, QUICK, Bench, Ran

ROOT = Path(__file__).parents[1]


class TestTheRecord:
    @pytest.fixture
    def ran(self, run_bench: Bench, bench_gguf: Path) -> Ran:
        ran = run_bench("--model", bench_gguf, "--sa", "1:2-3", *QUICK)
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
    run_bench: Bench, untrained_shape: Path, in_this_process: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for slowest, told in ((0.015, False), (0.1, True)):
        monkeypatch.setattr(contender.Minisa, "decode", lambda self, context, steps, s=slowest: [0.01, s] * steps)
        ran = run_bench("--random-weights", untrained_shape, "--sa", "none", *QUICK)
        assert ("DISTURBED: some speeds swung by 10.0×" in ran.out) is told


def test_a_wrong_formula_is_reported(run_bench: Bench, bench_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "kv_bytes", lambda *arguments: costs.kv_bytes(*arguments) - 2)
    ran = run_bench("--model", bench_gguf, "--sa", "none", *QUICK)
    assert ran.configuration("plain")["kv_bytes_match"] is False
    assert "MISMATCH: the KV cache of plain takes 65,536 bytes, the formula says 65,534" in ran.out


class TestAgainst:
    """On the same weights and in fp32 a fair comparison gives the same greedy tokens."""

    @pytest.mark.parametrize("model", ["--model", "--random-weights"])
    @pytest.mark.parametrize(
        ("peer", "packages"), [("transformers", ["transformers"]), ("llama.cpp", ["xllamacpp", "gguf"])]
    )
    def test_equal_greedy_tokens(
        self, peer: str, packages: list[str], model: str, run_bench: Bench, bench_gguf: Path, untrained_shape: Path
    ) -> None:
        for package in packages:
            pytest.importorskip(package, reason='needs pip install "minisa[peers]"')
        path = bench_gguf if model == "--model" else untrained_shape
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
        self, run_bench: Bench, bench_gguf: Path, in_this_process: list[Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pytest.importorskip("transformers", reason='needs pip install "minisa[peers]"')
        from minisa.benchmark import transformers_peer

        monkeypatch.setattr(transformers_peer, "rope_frequencies", lambda config: torch.ones(config.head_dim // 2))
        ran = run_bench("--model", bench_gguf, *QUICK, "--no-compile", "--against", "transformers")
        assert ran.record["plain_over_peers"][0]["same_greedy_tokens"] < 16

    def test_llama_cpp_needs_the_cpu_and_a_type_it_shares(self, bench_gguf: Path, run_bench: Bench) -> None:
        pytest.importorskip("xllamacpp", reason='needs pip install "minisa[peers]"')
        ran = run_bench("--model", bench_gguf, "--dtype", "fp16", "--against", "llama.cpp")
        assert ran.status == 2 and "leave out --dtype fp16" in ran.err


class TestBeingStopped:
    def test_ctrl_c_prints_what_is_done(
        self, run_bench: Bench, bench_gguf: Path, in_this_process: list[Any], monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
    ) -> None:  # fmt: skip
        decode = contender.Minisa.decode

        def interrupted(self: contender.Minisa, context: int, steps: int) -> list[float]:
            if context == 20:
                raise KeyboardInterrupt
            return decode(self, context, steps)

        monkeypatch.setattr(contender.Minisa, "decode", interrupted)
        ran = run_bench("--model", bench_gguf, "--sa", "3", *QUICK, "--json", tmp_path / "record.json")
        assert ran.status == 130
        assert ran.record["interrupted"] is True and "interrupted" in ran.out.rpartition("\n{")[0]
        assert json.loads((tmp_path / "record.json").read_text()) == ran.record
        done, missing = ran.configuration("shared")["decode"]
        assert done["tokens_per_second"]["median"] > 0 and missing["tokens_per_second"] is None
        assert ran.record["shared_over_plain"]["decode"][1]["ratio"] is None
        assert ran.record["ceiling"]["read_bandwidth"]["end"] is None

    def test_before_anything_was_measured(
        self, run_bench: Bench, bench_gguf: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def interrupted(*_: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(benchmark_run, "ReadBandwidth", interrupted)
        ran = run_bench("--model", bench_gguf, *QUICK)
        assert ran.status == 130
        assert ran.record["configurations"] == []

    def test_an_error_half_way_keeps_what_is_done(
        self, run_bench: Bench, bench_gguf: Path, in_this_process: list[Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(self: contender.Minisa, context: int, steps: int) -> list[float]:
            raise minisa.MinisaError("out of memory")

        monkeypatch.setattr(contender.Minisa, "decode", full)
        ran = run_bench("--model", bench_gguf, *QUICK)
        assert ran.status == 2 and ran.err.endswith("bench.py: out of memory\n")
        assert ran.configuration("plain")["prefill"][0]["rounds"] == 2

    def test_a_real_interrupt_ends_every_process_with_130(self, bench_gguf: Path) -> None:
        """Ctrl-C on a terminal goes to the whole process group, workers too."""
        flags = ["--model", str(bench_gguf), *map(str, QUICK), "--repeats", "1000000", "--threads", "1"]
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
