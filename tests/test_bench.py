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
from minisa.sharing import SharingPlan
from tests.bench_runs import CONFIG, PLAN, QUICK, Bench, Ran

ROOT = Path(__file__).parents[1]


class TestTheRecord:
    @pytest.fixture
    def ran(self, run_bench: Bench, bench_gguf: Path) -> Ran:
        ran = run_bench("--model", bench_gguf, "--sa", "1:2-3", *QUICK)
        assert ran.status == 0, ran.err
        return ran

    def test_what_is_measured_fits_what_the_formulas_say(self, ran: Ran) -> None:
        record = ran.record
        assert not record["interrupted"]
        assert record["model"] == {
            "name": "tiny.gguf", "random_weights": False, "layers": 4, "dim": 64, "max_seq_len": 128,
            "parameters": costs.parameter_count(CONFIG, SharingPlan.none(4)),
        }  # fmt: skip
        for name, plan in (("plain", SharingPlan.none(4)), ("shared", PLAN)):
            found = ran.configuration(name)
            assert found["load_seconds"] > 0 and found["first_token_seconds"] > 0
            assert found["peak_memory"] > found["memory_before_load"] > 1 << 20
            assert found["kv_bytes"] == found["kv_bytes_by_formula"] == costs.kv_bytes(CONFIG, plan, 64, 4)
            prefill, decode = ran.cells(name, "prefill"), ran.cells(name, "decode")
            assert [(cell["tokens"], cell["rounds"], cell["steps"]) for cell in prefill] == [(8, 2, 2), (24, 2, 2)]
            assert [(cell["tokens"], cell["rounds"], cell["steps"]) for cell in decode] == [(0, 2, 6), (20, 2, 6)]
            for cell in prefill + decode:
                speed = cell["tokens_per_second"]
                assert 0 < speed["p10"] <= speed["median"] <= speed["p90"]
                assert cell["allowed_tokens_per_second"] > 0
            for cell in decode:
                parts = dict(cell["bytes"])
                assert parts.pop("total") == sum(parts.values())
                speed = cell["bytes"]["total"] * cell["tokens_per_second"]["median"]
                assert cell["share"] == pytest.approx(speed / cell["bandwidth"]["median"])
            for cell in prefill:
                fastest = cell["flops"] / record["ceiling"]["start"]["matrix_rate"]["best"]
                assert cell["share"] == pytest.approx(fastest * cell["tokens_per_second"]["median"] / cell["tokens"])
        for when in ("start", "end"):
            for found in record["ceiling"][when].values():
                assert found["best"] >= found["median"] > 0
        assert "MISMATCH" not in ran.out
        keys = {*record, *record["model"], *record["run"], *record["ceiling"], *record["ceiling"]["start"]}
        keys |= {*record["cells"][0], *record["configurations"][0]}
        assert [key for key in keys if key not in str(report.__doc__)] == []

    def test_sharing_is_compared_by_the_round_and_with_the_prediction(self, ran: Ran) -> None:
        shared = ran.configuration("shared")
        assert shared["plan"] == str(PLAN) and shared["followers"] == 2
        assert shared["kv_over_plain"] == {"ratio": 0.75, "predicted": 0.75}  # n/(2L) of it is saved
        assert shared["weights_over_plain"]["ratio"] == pytest.approx(shared["weights_over_plain"]["predicted"])
        for kind, amount in (("decode", lambda cell: cell["bytes"]["total"]), ("prefill", lambda cell: cell["flops"])):
            for one, other in zip(ran.cells("plain", kind), ran.cells("shared", kind), strict=True):
                assert other["predicted"] == amount(one) / amount(other) > 1
                assert 0 < other["ratio"]["p10"] <= other["ratio"]["median"] <= other["ratio"]["p90"]
                assert one["ratio"] is None

    def test_a_person_reads_the_tables(self, ran: Ran) -> None:
        lines = ran.out.splitlines()
        starts = [
            "tiny.gguf: ",
            "ceiling, ",
            "decode step by formula",
            "tokens/s",
            "prefill 8",
            "decode 0",
            "decode 20",
        ]
        places = [next(i for i, line in enumerate(lines) if line.startswith(start)) for start in starts]
        assert places == sorted(places)
        cell = ran.cells("shared", "decode")[1]
        (row,) = (lines[i + 1] for i, line in enumerate(lines) if line.startswith("decode 20"))
        assert row.split()[:2] == ["shared", f"{cell['tokens_per_second']['median']:,.1f}"]
        assert row.endswith(f"{cell['predicted']:.3f}")
        assert max(map(len, lines[:-1])) <= 120
        assert "decode 20" in ran.err  # progress


def test_a_disturbed_run_and_a_wrong_formula_say_so(
    run_bench: Bench, bench_gguf: Path, in_this_process: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "kv_bytes", lambda *arguments: costs.kv_bytes(*arguments) - 2)
    for slowest, disturbed in ((0.015, False), (0.1, True)):
        monkeypatch.setattr(contender.Minisa, "decode", lambda self, context, steps, s=slowest: [0.01, s] * steps)
        ran = run_bench("--model", bench_gguf, "--sa", "none", *QUICK)
        assert ("DISTURBED: some speeds swung by 10.0×" in ran.out) is disturbed
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
        assert [it["name"] for it in ran.record["configurations"]] == ["plain", "shared", peer]
        assert ran.configuration(peer)["same_greedy_tokens"] == ran.record["run"]["greedy_tokens"] == 16
        for cell in ran.cells(peer, "prefill") + ran.cells(peer, "decode"):
            assert cell["ratio"]["median"] > 0 and cell["tokens_per_second"]["median"] > 0
        plain = ran.configuration("plain")["weight_bytes"]
        assert plain <= ran.configuration(peer)["weight_bytes"] <= 1.01 * plain  # llama.cpp counts rotary factors in
        assert f"{peer}: " in ran.out and "16 of 16 greedy tokens like plain's" in ran.out

    def test_a_peer_that_computes_something_else_is_found_out(
        self, run_bench: Bench, bench_gguf: Path, in_this_process: list[Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pytest.importorskip("transformers", reason='needs pip install "minisa[peers]"')
        from minisa.benchmark import transformers_peer

        monkeypatch.setattr(transformers_peer, "rope_frequencies", lambda config: torch.ones(config.head_dim // 2))
        ran = run_bench("--model", bench_gguf, *QUICK, "--no-compile", "--against", "transformers")
        assert ran.configuration("transformers")["same_greedy_tokens"] < 16

    def test_llama_cpp_needs_a_type_it_shares(
        self, bench_gguf: Path, run_bench: Bench, in_this_process: list[Any]
    ) -> None:
        pytest.importorskip("xllamacpp", reason='needs pip install "minisa[peers]"')
        ran = run_bench("--model", bench_gguf, "--dtype", "fp16", "--against", "llama.cpp")
        assert ran.status == 2 and "leave out --dtype fp16" in ran.err


class TestBeingStopped:
    @pytest.mark.parametrize(
        ("stop", "status"), [(KeyboardInterrupt(), 130), (minisa.MinisaError("out of memory"), 2)], ids=str
    )
    def test_half_way_it_prints_what_is_done(
        self, stop: BaseException, status: int, run_bench: Bench, bench_gguf: Path, in_this_process: list[Any],
        monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    ) -> None:  # fmt: skip
        decode = contender.Minisa.decode

        def stopped(self: contender.Minisa, context: int, steps: int) -> list[float]:
            if context == 20:
                raise stop
            return decode(self, context, steps)

        monkeypatch.setattr(contender.Minisa, "decode", stopped)
        ran = run_bench("--model", bench_gguf, "--sa", "3", *QUICK, "--json", tmp_path / "record.json")
        assert ran.status == status
        assert ran.record["interrupted"] is True and "interrupted" in ran.out.rpartition("\n{")[0]
        assert json.loads((tmp_path / "record.json").read_text()) == ran.record
        done, missing = ran.cells("shared", "decode")
        assert done["tokens_per_second"]["median"] > 0
        assert missing["tokens_per_second"] is missing["ratio"] is ran.record["ceiling"]["end"] is None

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
                if line == "prefill 8\n":
                    break
            time.sleep(0.3)
            os.killpg(process.pid, signal.SIGINT)
            out, err = process.communicate(timeout=60)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        assert process.returncode == 130
        assert "Traceback" not in err
        record = json.loads(out.splitlines()[-1])
        assert record["interrupted"] is True and record["cells"][0]["rounds"] > 0
