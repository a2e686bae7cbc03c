"""What bench.py is made of: timing primitives, worker processes, random models, GGUF files for llama.cpp."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from minisa.benchmark import measure
from minisa.benchmark.contender import Facts, Minisa, Opening
from minisa.benchmark.gguf_writer import write_gguf
from minisa.benchmark.report import cost
from minisa.benchmark.synthetic import random_llm
from minisa.benchmark.worker import Worker
from minisa.checkpoint import load_weights, open_checkpoint, read_gguf
from minisa.config import ModelConfig, RopeScaling
from minisa.engine import LLM
from minisa.errors import MinisaError
from minisa.model import Transformer
from minisa.rope import rope_frequencies
from minisa.sharing import SharingPlan
from tests.tiny import tiny_config

CPU = torch.device("cpu")
SHARED = SharingPlan.parse("1:2-3", 4)


def opening(config: ModelConfig | None = None, plan: SharingPlan | None = None, **options: Any) -> Opening:
    config = config or tiny_config()
    given = {"path": None, "device": CPU, "dtype": "fp32", "context": 128, "threads": 2} | options
    return Opening(config=config, plan=plan or SharingPlan.none(config.n_layers), **given)


class TestPrimitives:
    def test_percentiles(self) -> None:
        """They lie between neighbours, and the slow end of times is the low end of rates."""
        assert measure.Spread.of([5.0, 1.0, 3.0, 2.0, 4.0]) == measure.Spread(3.0, 1.4, 4.6)
        assert measure.Spread.of([7.0]) == measure.Spread(7.0, 7.0, 7.0)
        times = measure.Spread.of([0.1, 0.2, 0.4])
        rates = times.rate(8)
        assert rates.p10 == 8 / times.p90 < rates.median == 40 < rates.p90

    def test_turns_go_there_and_back_until_the_time_is_over(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(measure, "PAUSE", 0)
        assert "".join(turn for _, turn in measure.turns("abc", 3)) == "abccbaabc"
        assert len(list(measure.turns("a", None))) == measure.MAX_ROUNDS
        monkeypatch.setattr(measure, "MAX_SECONDS", 0)
        assert len(list(measure.turns("a", None))) == measure.MIN_ROUNDS
        assert len(list(measure.turns("a", 9))) == 9

    def test_bandwidth_is_read_from_memory_and_not_from_a_cache(self) -> None:
        threads = torch.get_num_threads()
        reader = measure.ReadBandwidth(CPU)
        parts = [part for share in reader._shares for part in share]
        assert sum(part.nbytes for part in parts) == measure.N_BUFFERS * reader.nbytes >= 1 << 28
        assert len({part.data_ptr() for part in parts}) == len(parts)
        assert torch.get_num_threads() == threads  # those of the reader are its own affair
        assert 1e8 < reader.once() < 1e13  # bytes a second: no unit is wrong by a thousand

    def test_the_matrix_rate_counts_two_operations_for_each_product(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(measure, "MAX_MATRIX", 512)
        monkeypatch.setattr(measure, "timed", lambda work, device: (0.5, work()))
        monkeypatch.setattr(measure, "LONG_ENOUGH", 1.0)
        assert measure.matrix_rates(CPU, torch.float32, repeats=2) == [2 * 512**3 / 0.5] * 2


def random(**options: Any) -> LLM:
    return random_llm(**{"config": tiny_config(), "plan": SHARED, "device": CPU, "dtype": torch.float32} | options)


class TestRandomModel:
    def test_the_same_seed_gives_the_same_model_and_another_seed_another(self) -> None:
        logits = [random(max_seq_len=32, seed=seed).logits([1, 2, 3]) for seed in (0, 0, 1)]
        assert torch.equal(logits[0], logits[1]) and not torch.allclose(logits[0], logits[2])
        assert logits[0].isfinite().all() and 0.1 < logits[0].std() < 10

    def test_shape_plan_dtype_and_batch(self) -> None:
        llm = random(dtype="bf16", max_seq_len=32, max_batch=3, kv_dtype="fp8")
        names = dict(llm.model.named_parameters())
        assert "layers.1.attention.wq.weight" in names and "layers.2.attention.wq.weight" not in names
        assert {parameter.dtype for parameter in names.values()} == {torch.bfloat16}
        assert (llm.cache.batch, llm.cache.length, llm.cache.values.dtype) == (3, 32, torch.float8_e4m3fn)
        with pytest.raises(MinisaError, match="token"):
            next(llm.generate("hello"))

    @pytest.mark.parametrize("tied", [True, False])
    @pytest.mark.parametrize("quantize", [None, "int8", "int4"])
    def test_the_weights_that_a_step_reads(self, quantize: str | None, tied: bool) -> None:
        """All but an embedding that is not the head too."""
        config = tiny_config(tie_embeddings=tied)
        llm = random(config=config, dtype=torch.bfloat16, max_seq_len=32, quantize=quantize)
        read = sum(t.nbytes for name, t in llm.model.state_dict().items() if tied or "tok_embeddings" not in name)
        settings: Any = SimpleNamespace(opening=opening(config, SHARED, quantize=quantize), new_tokens=1)
        facts = Facts(llm.weight_bytes, torch.bfloat16, torch.bfloat16, 0, 0)
        configuration: Any = SimpleNamespace(plan=SHARED, facts=facts)
        assert cost(settings, configuration, 0).weights == read


class TestContender:
    def test_a_context_filled_in_parts_is_the_context(self) -> None:
        """Decoding at 9 leaves its tokens in the slots behind; the next fill must overwrite them."""
        tokens = list(range(1, 41))
        parts, whole = (Minisa(opening(plan=SHARED, batch=2)) for _ in range(2))
        parts.prefill(tokens[::-1])
        for length in (9, 40):
            parts.fill(tokens[:length], batch=2)
            parts.decode(length, 3)
        whole.fill(tokens, batch=2)
        for name in ("keys", "values"):
            left, right = (getattr(it.llm.cache, name)[:, :, :, :40] for it in (parts, whole))
            assert right.std() > 0.01
            assert torch.allclose(left, right, atol=1e-5)

    @pytest.mark.parametrize("queued", [False, True])
    def test_decode_times_the_steps_asked_for_with_the_tokens_before_them_in_sight(
        self, queued: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        contender = Minisa(opening(batch=2))
        contender.llm.runner.asynchronous = queued  # type: ignore[misc]
        contender.fill(list(range(20)), batch=2)
        seen: list[object] = []
        decode = contender.llm.runner.decode

        def spy(tokens: torch.Tensor, positions: torch.Tensor, cache: Any, in_use: int) -> torch.Tensor:
            seen.append((positions.tolist(), in_use))
            return decode(tokens, positions, cache, in_use)

        monkeypatch.setattr(contender.llm.runner, "decode", spy)
        monkeypatch.setattr("minisa.benchmark.contender.begin_reading", lambda tokens: lambda: seen.append("read"))
        assert len(contender.decode(20, 3)) == 3
        first, second, third = (([p, p], p + 1) for p in (20, 21, 22))
        lead_in = [first, "read", first, "read"]
        if queued:
            assert seen == [*lead_in, first, second, "read", third, "read", "read"]
        else:
            assert seen == [*lead_in, first, "read", second, "read", third, "read"]

    def test_greedy_takes_the_largest_logit_each_time(self) -> None:
        contender = Minisa(opening(plan=SHARED))
        tokens = [7, 8, 9, 10]
        for _ in range(5):
            tokens.append(int(contender.llm.logits(tokens)[-1].argmax()))
        assert contender.greedy(tokens[:4], 5) == tokens[4:]

    def test_flags_reach_load(self, monkeypatch: pytest.MonkeyPatch) -> None:
        given: dict[str, object] = {}
        monkeypatch.setattr("minisa.benchmark.contender.load", lambda path, **options: given.update(options))
        flags = {"compile": True, "quantize": "int8", "kv_dtype": "fp8"}
        opening(path=Path("model.gguf"), batch=3, plan=SHARED, **flags).llm()
        assert given == {"sa": SHARED, "device": "cpu", "dtype": "fp32", "max_seq_len": 128, "max_batch": 3} | flags


class Served:
    """What a Worker can be asked in these tests."""

    def __init__(self, number: int) -> None:
        if number < 0:
            raise MinisaError(f"{number} is negative")
        self.number = number

    def add(self, other: int) -> int:
        self.number += other
        return self.number

    def pid(self) -> int:
        return os.getpid()

    def refuse(self) -> None:
        raise MinisaError("not today")

    def fail(self) -> None:
        raise ZeroDivisionError("a bug")

    def exhaust(self) -> None:
        torch.empty(1 << 50)

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class TestWorker:
    def test_it_lives_elsewhere_keeps_its_state_and_does_not_hear_ctrl_c(self) -> None:
        worker = Worker("one", Served, 1)
        try:
            assert worker.call("add", 2) == 3
            pid = worker.call("pid")
            assert pid != os.getpid()
            os.kill(pid, signal.SIGINT)
            assert worker.call("add", 2) == 5
        finally:
            worker.close()
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)

    def test_errors_come_back(self) -> None:
        with pytest.raises(MinisaError, match="two: -1 is negative"):
            Worker("two", Served, -1)
        worker = Worker("one", Served, 1)
        try:
            for method, error, says in (
                ("refuse", MinisaError, "one: not today"),
                ("exhaust", MinisaError, "one: out of memory"),
                ("fail", RuntimeError, "ZeroDivisionError: a bug"),
                ("die", MinisaError, "one: its process ended with status -9"),
            ):
                with pytest.raises(error, match=says):
                    worker.call(method)
        finally:
            worker.close()


class TestGGUFForLlamaCpp:
    @pytest.mark.parametrize(
        ("flags", "kinds", "limit"),
        [
            ({"dtype": "fp32"}, {"F32"}, 0.0),
            ({"dtype": "bf16"}, {"BF16"}, 0.0),
            ({"dtype": "bf16", "quantize": "int8"}, {"Q8_0"}, 0.01),
            ({"dtype": "bf16", "quantize": "int4"}, {"Q4_0", "Q8_0"}, 0.2),
        ],
        ids=["fp32", "bf16", "int8", "int4"],
    )
    def test_weights_and_config_come_back(
        self, flags: dict[str, str], kinds: set[str], limit: float, tmp_path: Path
    ) -> None:
        pytest.importorskip("gguf", reason='needs pip install "minisa[peers]"')
        config = tiny_config(rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 64))
        given, path = opening(config, **flags), tmp_path / "it.gguf"
        write_gguf(given, path)
        assert {info.type.name for info in read_gguf(path).tensors if len(info.shape) > 1} == kinds
        checkpoint = open_checkpoint(path)
        model = Transformer(checkpoint.config, given.plan)
        load_weights(model, checkpoint, device="cpu", dtype=torch.float32)
        dtype = torch.float32 if flags["dtype"] == "fp32" or limit else torch.bfloat16
        for name, weight in given.weights(dtype).state_dict().items():
            assert (model.state_dict()[name] - weight.float()).norm() <= limit * weight.float().norm(), name
        assert torch.allclose(rope_frequencies(checkpoint.config), rope_frequencies(config), rtol=1e-6)
        for key in ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim", "vocab_size", "max_seq_len"):
            assert getattr(checkpoint.config, key) == getattr(config, key)
