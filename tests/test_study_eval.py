"""python -m minisa eval: tables, records, flags."""

from __future__ import annotations

import json
import math
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from minisa import LLM, cli, load
from minisa.errors import MinisaError
from minisa.sharing import SharingPlan
from minisa.study import eval_command, evaluate
from minisa.study.evaluation_report import plot
from minisa.study.tasks import TASKS, read_questions, read_rows
from minisa.study.variants import Models, parse_variants
from tests.commands import Ran
from tests.engines import llm_of
from tests.loadable import N_TOKENS, VOCABULARY, loadable_gguf, loadable_hf
from tests.models import SIX_LAYERS
from tests.study_models import STUDY_CONFIG
from tests.study_rows import GSM8K, LAMBADA, PIQA, ROWS, some_text, write_rows
from tests.tiny import random_weights, tiny_config, write_gguf

Run = Callable[..., Ran]


@pytest.fixture
def run_eval(run_main: Run, study_gguf: Path) -> Run:
    """run_eval(*flags): `python -m minisa eval` on the tiny model, in this process."""

    def run(*flags: object) -> Ran:
        return run_main(cli.main, "minisa", "eval", "--model", study_gguf, "--device", "cpu", *flags)

    return run


@pytest.fixture
def piqa(tmp_path: Path) -> Path:
    rows = [
        PIQA | {"goal": some_text(5 + i, i), "sol1": some_text(3, 50 + i), "sol2": some_text(4, 70 + i), "label": i % 2}
        for i in range(12)
    ]
    return write_rows(tmp_path / "piqa.jsonl", *rows)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(some_text(600, 9))
    return path


class TestTheCommand:
    def test_several_plans_and_rivals_in_one_table(self, run_eval: Run, text: Path, tmp_path: Path) -> None:
        pytest.importorskip("matplotlib", reason='needs pip install "minisa[plots]"')
        ran = run_eval(
            *("--task", "perplexity", "--data", text, "--length", 64, "--sa", "2", "--sa", "1:2-3"),
            *("--rival", "drop:2", "--rival", "cla:1:3", "--rival", "kv-int8", "--rival", "sa:2+kv-int8"),
            *("--json", tmp_path / "r.json", "--plot", tmp_path / "r.png"),
        )
        assert ran.status == 0, ran.err
        names = ["plain", "2", "1:2-3", "drop:2", "cla:1:3", "kv-int8", "sa:2+kv-int8"]
        lines = ran.out.splitlines()
        assert [line.split()[0] for line in lines[2:]] == names
        summary = json.loads((tmp_path / "r.json").read_text())
        assert [row["variant"] for row in summary["variants"]] == names
        assert [row["kv_saved"] for row in summary["variants"]] == pytest.approx(
            [0, 1 / 8, 2 / 8, 1 / 4, 1 / 4, 1 - 18 / 32, 1 - 7 / 8 * 18 / 32]
        )
        measured = [row["metrics"]["perplexity"] for row in summary["variants"]]
        assert measured[0]["ratio"] == 1 and measured[0]["ratio_stderr"] == 0
        for found in measured[1:]:
            assert found["ratio"] == pytest.approx(found["value"] / measured[0]["value"])
            assert found["ratio"] != 1 and found["ratio_stderr"] > 0
        assert f"{measured[1]['ratio']:.3f} ± {measured[1]['ratio_stderr']:.3f}" in lines[3]
        assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")

    def test_perplexity_is_the_mean_loss_of_the_windows(
        self, run_eval: Run, text: Path, study_llm: LLM, tmp_path: Path
    ) -> None:
        flags = ("--task", "perplexity", "--data", text, "--length", 50, "--limit", 3, "--json", tmp_path / "r.json")
        assert run_eval(*flags).status == 0
        found = json.loads((tmp_path / "r.json").read_text())
        ids = study_llm.tokenizer.encode(text.read_text())
        losses = []
        for start in (0, 50, 100):
            log_p = study_llm.logits(ids[start : start + 50]).log_softmax(-1)
            losses += [-log_p[t - 1, ids[start + t]].item() for t in range(1, 50)]
        assert found["items"] == 3
        value = found["variants"][0]["metrics"]["perplexity"]["value"]
        assert value == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)

    def test_accuracies_and_paired_differences(self, run_eval: Run, piqa: Path, tmp_path: Path) -> None:
        pytest.importorskip("matplotlib", reason='needs pip install "minisa[plots]"')
        output = ("--json", tmp_path / "r.json", "--plot", tmp_path / "r.png")
        ran = run_eval("--task", "piqa", "--data", piqa, "--sa", "1:2-3", *output)
        assert ran.status == 0, ran.err
        assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
        lines = [json.loads(line) for line in (tmp_path / "r.items.jsonl").read_text().splitlines()]
        items = {(line["variant"], line["item"]): line for line in lines if "item" in line}
        assert len(items) == 24
        rows = read_rows(piqa)
        hits = {
            name: [
                float(items[name, i]["log_likelihoods"][rows[i]["label"]] == max(items[name, i]["log_likelihoods"]))
                for i in range(12)
            ]
            for name in ("plain", "1:2-3")
        }
        plain, shared = json.loads((tmp_path / "r.json").read_text())["variants"]
        assert plain["metrics"]["acc"]["value"] == pytest.approx(sum(hits["plain"]) / 12)
        differences = [b - a for a, b in zip(hits["plain"], hits["1:2-3"], strict=True)]
        mean = sum(differences) / 12
        assert shared["metrics"]["acc"]["difference"] == pytest.approx(mean)
        stderr = math.sqrt(sum((d - mean) ** 2 for d in differences) / 11 / 12)
        assert shared["metrics"]["acc"]["difference_stderr"] == pytest.approx(stderr)
        assert items["plain", 0]["log_likelihoods"] != items["1:2-3", 0]["log_likelihoods"]

    def test_goes_on_where_it_was_interrupted(
        self, run_eval: Run, piqa: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        flags = ("--task", "piqa", "--data", piqa, "--batch-tokens", 200, "--sa", "2", "--json", tmp_path / "r.json")
        whole = tmp_path / "whole.json"
        assert run_eval(*flags[:-1], whole).status == 0
        real, asked = evaluate.Choices.run, []

        def run(self: Any, llm: LLM, batch: Any) -> Any:
            if len(asked) >= 4 and not resumed:
                raise KeyboardInterrupt
            asked.extend(batch)
            return real(self, llm, batch)

        resumed = False
        monkeypatch.setattr(evaluate.Choices, "run", run)
        stopped = run_eval(*flags)
        assert stopped.status == 130
        assert "interrupted: what is done is kept" in stopped.err
        assert not (tmp_path / "r.json").exists()
        resumed = True
        assert run_eval(*flags).status == 0
        assert sorted(asked) == sorted([*range(12)] * 2)  # nothing twice: twelve for plain, twelve for the plan
        found, expected = (json.loads(path.read_text())["variants"] for path in (tmp_path / "r.json", whole))
        assert [row["metrics"]["acc"] for row in found] == [row["metrics"]["acc"] for row in expected]
        asked.clear()
        assert run_eval(*flags, "--sa", "3").status == 0
        assert sorted(asked) == [*range(12)]  # a plan more: only it is run
        other = run_eval(*flags, "--shots", 1, "--shots-data", piqa)
        assert other.status == 2 and "made with shots 0, now it is 1" in other.err
        (tmp_path / "another").mkdir()
        another = loadable_gguf(tmp_path / "another" / "tiny.gguf", STUDY_CONFIG, seed=1)
        other = run_eval(*flags, "--model", another)
        assert other.status == 2 and "made with checkpoint" in other.err

    def test_batch_tokens_bound_the_batch(
        self, run_eval: Run, piqa: Path, text: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sizes: list[int] = []
        for kind in (evaluate.Choices, evaluate.Perplexity):
            real = kind.run

            def run(self: Any, llm: LLM, batch: Any, real: Any = real) -> Any:
                sizes.append(len(batch))
                return real(self, llm, batch)

            monkeypatch.setattr(kind, "run", run)
        for flags, expected in (
            (("--task", "piqa", "--data", piqa), 12),
            (("--task", "piqa", "--data", piqa, "--batch-tokens", 1), 1),
            (("--task", "perplexity", "--data", text, "--length", 50, "--batch-tokens", 150), 3),
        ):
            sizes.clear()
            assert run_eval(*flags).status == 0
            assert max(sizes) == expected

    def test_shots_reach_the_prompt(self, run_eval: Run, piqa: Path, tmp_path: Path) -> None:
        totals = []
        for number, flags in enumerate(((), ("--shots", 2, "--shots-data", piqa))):
            file = tmp_path / f"{number}.json"
            assert run_eval("--task", "piqa", "--data", piqa, "--limit", 1, "--json", file, *flags).status == 0
            line = json.loads(file.with_suffix(".items.jsonl").read_text().splitlines()[-1])
            totals.append(line["log_likelihoods"][0])
        assert totals[0] != pytest.approx(totals[1], abs=1e-3)

    @pytest.mark.parametrize("task", ["piqa", "gsm8k"])
    def test_items_that_are_cut_are_counted(self, task: str, run_eval: Run, tmp_path: Path) -> None:
        long = {"goal" if task == "piqa" else "question": some_text(700, 1)}
        data = write_rows(tmp_path / "rows", ROWS[task], ROWS[task] | long)
        ran = run_eval("--task", task, "--data", data, "--shots", 0, "--json", tmp_path / "r.json")
        assert ran.status == 0, ran.err
        assert "1 items are cut at the beginning to fit the model's 2048 tokens" in ran.err
        assert json.loads((tmp_path / "r.json").read_text())["cut"] == 1

    @pytest.mark.parametrize("sa", [[], ["--sa", "1:2-3"], ["--rival", "cla:1:2"], ["--rival", "drop:0+kv-int8"]])
    def test_generated_answers_are_greedy_text(
        self, sa: list[str], run_eval: Run, study_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Two rows together give what step-by-step argmax over the whole text gives; 5 shots are the default."""
        monkeypatch.setattr(evaluate, "ANSWER_TOKENS", 6)
        rows = [GSM8K | {"question": some_text(3 + i, i)} for i in range(7)]
        data, pool = write_rows(tmp_path / "rows", *rows[:2]), write_rows(tmp_path / "pool", *rows)
        ran = run_eval("--task", "gsm8k", "--data", data, "--shots-data", pool, "--json", tmp_path / "r.json", *sa)
        assert ran.status == 0, ran.err
        lines = [json.loads(line) for line in (tmp_path / "r.items.jsonl").read_text().splitlines()]
        answers = {(line["variant"], line["item"]): line["answer"] for line in lines if "item" in line}
        questions = read_questions(TASKS["gsm8k"], data, 5, pool)
        assert questions[0].prompts[0].count("Question:") == 6
        models = Models(lambda plan: load(study_gguf, plan, "cpu", "fp32", max_seq_len=1, compile=False))
        plans, rivals = (sa[1::2] if sa[:1] == [flag] else [] for flag in ("--sa", "--rival"))
        for variant in parse_variants(plans, rivals, STUDY_CONFIG, None):
            with models.opened(variant) as llm:
                for item, question in enumerate(questions):
                    ids = llm.tokenizer.encode(question.prompts[0])
                    start = len(ids)
                    while len(ids) < start + 6 and not (len(ids) > start and ids[-1] in llm.tokenizer.eos_ids):
                        ids.append(int(llm.logits(ids)[-1].argmax()))
                    assert answers[variant.name, item] == llm.tokenizer.decode(ids[start:], mid_text=True)
        variants = json.loads((tmp_path / "r.json").read_text())["variants"]
        assert [list(row["metrics"]) for row in variants] == [["acc", "last_number"]] * (1 + bool(sa))

    def test_a_perplexity_beyond_floats_is_unknown(self, run_eval: Run, tmp_path: Path) -> None:
        pytest.importorskip("matplotlib", reason='needs pip install "minisa[plots]"')
        data = write_rows(tmp_path / "rows", LAMBADA | {"continuation": some_text(300, 1)})
        ran = run_eval("--task", "lambada", "--data", data, "--json", tmp_path / "r.json", "--plot", tmp_path / "r.png")
        assert ran.status == 0 and "unknown" in ran.out, ran.err
        summary = json.loads((tmp_path / "r.json").read_text())
        assert summary["variants"][0]["metrics"]["perplexity"]["value"] is None
        assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")  # of the accuracy
        summary["variants"][0]["metrics"]["acc"]["value"] = None
        with pytest.raises(MinisaError, match="nothing to draw, acc is unknown"):
            plot(summary, "r.png")

    @pytest.mark.parametrize("scale", [1, 1e3], ids=["some logits overflow", "all do"])
    @pytest.mark.parametrize("task", ["perplexity", "piqa", "lambada", "mrpc"])
    def test_numbers_that_overflow_score_nothing(
        self, task: str, scale: float, run_eval: Run, text: Path, tmp_path: Path
    ) -> None:
        """A model that says nothing would else be right wherever the first choice is."""
        weights = random_weights(STUDY_CONFIG)
        weights["norm.weight"] *= 1e4
        weights["tok_embeddings.weight"] *= scale
        model = write_gguf(tmp_path / "large.gguf", STUDY_CONFIG, weights, metadata=VOCABULARY)
        data = text if task == "perplexity" else write_rows(tmp_path / "rows", *[ROWS[task]] * 3)
        flags = ("--model", model, "--dtype", "fp16", "--task", task, "--data", data, "--json", tmp_path / "r.json")
        for _ in range(2):  # the second goes on from the records of the first
            ran = run_eval(*flags)
            assert ran.status == 0, ran.err
        metrics = json.loads((tmp_path / "r.json").read_text())["variants"][0]["metrics"]
        assert {found["value"] for found in metrics.values()} == {None}

    @pytest.mark.parametrize("task", ["perplexity", "piqa", "gsm8k"])
    def test_tokens_that_the_model_has_not(self, task: str, run_eval: Run, tmp_path: Path) -> None:
        folder = loadable_hf(tmp_path / "small", tiny_config(vocab_size=70, max_seq_len=64))
        data = write_rows(tmp_path / "rows", ROWS.get(task, GSM8K))
        flags = ("--length", 8) if task == "perplexity" else ("--shots", 0)
        ran = run_eval("--model", folder, "--task", task, "--data", data, *flags)
        assert ran.status == 2 and "by the model's tokenizer, has token id" in ran.err
        assert "the vocabulary is 0 to 69" in ran.err

    def test_dtype_and_quantize(self, run_eval: Run, text: Path, tmp_path: Path) -> None:
        found = []
        for number, flags in enumerate(
            (("--dtype", "fp32"), ("--dtype", "bf16"), ("--dtype", "fp32", "--quantize", "int4"))
        ):
            file = tmp_path / f"{number}.json"
            ran = run_eval("--task", "perplexity", "--data", text, "--length", 64, "--json", file, *flags)
            assert ran.status == 0, ran.err
            record = json.loads(file.read_text())
            found.append(record["variants"][0]["metrics"]["perplexity"]["value"])
            assert record["settings"]["dtype"] == flags[1]
        assert len(set(found)) == 3
        assert found[1] == pytest.approx(found[0], rel=0.05)

    @pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
    def test_what_answers_is_measured_as_it_runs(self, run_eval: Run, text: Path, tmp_path: Path) -> None:
        """Weights and activations in eight bits, keys and values in fp8: by no numbers but the C++ step's."""
        config = tiny_config(vocab_size=N_TOKENS, n_heads=2, n_kv_heads=1, head_dim=32)
        model = loadable_gguf(tmp_path / "wide.gguf", config)
        stored = {"quantize": "int8", "kv_dtype": "fp8"}
        flags = ("--model", model, "--task", "perplexity", "--data", text, "--length", 100, "--limit", 2, "--sa", "1")

        def values(*more: object) -> list[float]:
            ran = run_eval(*flags, *more, "--json", tmp_path / f"{len(more)}.json")
            assert ran.status == 0, ran.err
            rows = json.loads((tmp_path / f"{len(more)}.json").read_text())["variants"]
            return [row["metrics"]["perplexity"]["value"] for row in rows]

        def expected(sa: str | None) -> float:
            llm = load(model, sa=sa, device="cpu", max_seq_len=1, compile=True, **stored)
            assert llm.runner.name == "C++ step"
            ids = torch.tensor(llm.tokenizer.encode(text.read_text())[:200]).view(2, 100)
            log_p = torch.stack([llm.logits(window.tolist()) for window in ids]).log_softmax(-1)
            return math.exp(-log_p[:, :-1].gather(-1, ids[:, 1:, None]).double().mean().item())

        as_run = values("--quantize", "int8", "--as-run", "--kv-dtype", "fp8")
        assert as_run == pytest.approx([expected(None), expected("1")], rel=1e-6)
        others = values("--quantize", "int8", "--as-run") + values("--quantize", "int8")
        assert min(abs(one / other - 1) for one in as_run for other in others) > 1e-5

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (("--task", "piqa", "--as-run"), "--as-run: for --task perplexity without rivals"),
            (("--task", "perplexity", "--as-run", "--rival", "kv-int8"), "--as-run: for --task perplexity without"),
            (("--task", "perplexity", "--kv-dtype", "fp8"), "--kv-dtype fp8: goes with --as-run"),
            (("--task", "chess"), "'chess' is not one of"),
            (("--task", "perplexity", "--shots", 2), "perplexity has no examples"),
            (("--task", "piqa", "--length", 64), "--length: for perplexity only"),
            (("--task", "piqa", "--shots", 1), "needs --shots-data"),
            (("--task", "gsm8k"), "'answer' is missing"),
            (("--task", "piqa", "--limit", 0), "0 is not in the range x>=1"),
            (("--task", "piqa", "--sa", "9"), "layer 9 is outside the model"),
            (("--task", "piqa", "--sa", "2", "--sa", "2"), "2 is there twice"),
            (("--task", "piqa", "--rival", "sa:2+drop:1"), "only kv-int8 goes with a plan"),
            (("--task", "piqa", "--json", "no/such/r.json"), "there is no such folder"),
            (("--task", "piqa", "--device", "tpu"), "tpu"),
            (("--task", "piqa", "--model", "no-such-model"), "no-such-model"),
        ],
    )
    def test_bad_flags_are_one_line_and_status_2(self, flags: Any, message: str, run_eval: Run, piqa: Path) -> None:
        ran = run_eval("--data", piqa, *flags)
        assert ran.status == 2 and message in ran.err
        assert len(ran.err.strip().splitlines()) == 1

    def test_without_matplotlib_plot_is_refused_before_anything_is_run(
        self, run_eval: Run, piqa: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def missing() -> None:
            raise MinisaError('--plot: needs matplotlib; pip install "minisa[plots]"')

        monkeypatch.setattr(eval_command, "check_matplotlib", missing)
        monkeypatch.setattr(eval_command, "open_model", None)
        ran = run_eval("--task", "piqa", "--data", piqa, "--plot", "r.png")
        assert ran.status == 2 and "needs matplotlib" in ran.err


def test_one_model_in_memory_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[weakref.ref[LLM]] = []
    alive = []

    def load_one(sa: str | None) -> LLM:
        alive.append(sum(reference() is not None for reference in opened))
        llm = llm_of(SharingPlan.none(SIX_LAYERS.n_layers))
        opened.append(weakref.ref(llm))
        return llm

    class OneItem:
        def __len__(self) -> int:
            return 1

    results = SimpleNamespace(variant=lambda *_: {}, add=print)
    monkeypatch.setattr(eval_command, "_answer", lambda llm, *_: llm.logits([1]))
    variants = parse_variants(["2", "3"], [], SIX_LAYERS, None)
    eval_command.answer_all(Models(load_one), variants, OneItem(), results)  # type: ignore[arg-type]
    assert alive == [0, 0, 0]
