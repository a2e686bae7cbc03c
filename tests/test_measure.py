"""What bench.py is made of: timing primitives, worker processes, random models, GGUF files for llama.cpp."""

from __future__ import annotations

import os
import signal
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from minisa.benchmark import measure
from minisa.benchmark.contender import Facts, Minisa, Opening
from minisa.benchmark.gguf_writer import own_gguf, write_gguf
from minisa.benchmark.report import decode_cost
from minisa.benchmark.run import Measured
from minisa.benchmark.synthetic import random_llm
from minisa.benchmark.worker import Worker
from minisa.checkpoint import load_weights, open_checkpoint, read_gguf
from minisa.config import ModelConfig, RopeScaling
from minisa.errors import MinisaError
from minisa.model import Transformer
from minisa.rope import rope_frequencies
from minisa.sharing import SharingPlan
from tests.tiny import random_weights, tiny_config
from tests.tiny import write_gguf as write_tiny_gguf

CPU = torch.device("cpu")
SHARED = SharingPlan.parse("1:2-3", 4)


def opening(
    config: ModelConfig | None = None, plan: SharingPlan | None = None, path: Path | None = None, **options: object
) -> Opening:
    config = config or tiny_config()
    plan = plan or SharingPlan.none(config.n_layers)
    given = {"device": CPU, "dtype": torch.float32, "context": 128, "threads": 2} | options
    return Opening(path=path, config=config, plan=plan, **given)  # type: ignore[arg-type]


class TestPrimitives:
    def test_percentiles_lie_between_neighbours(self) -> None:
        values = [5.0, 1.0, 3.0, 2.0, 4.0]
        assert [measure.percentile(values, share) for share in (0, 0.1, 0.5, 0.9, 1)] == [1.0, 1.4, 3.0, 4.6, 5.0]
        assert measure.percentile([7.0], 0.9) == 7.0

    def test_the_slow_end_of_times_is_the_low_end_of_rates(self) -> None:
        times = measure.Spread.of([0.1, 0.2, 0.4])
        rates = times.rate(8)
        assert rates.p10 < rates.median == 40 < rates.p90
        assert rates.p10 == 8 / times.p90

    def test_turns_go_there_and_back(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(measure, "PAUSE", 0)
        assert list(measure.turns("abc", 3)) == [(0, c) for c in "abc"] + [(1, c) for c in "cba"] + [
            (2, c) for c in "abc"
        ]

    def test_turns_end_with_the_time_but_not_before_the_least(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(measure, "PAUSE", 0)
        assert [i for i, _ in measure.turns("a", 9, seconds=0, least=4)] == [0, 1, 2, 3]
        assert len(list(measure.turns("a", 9, seconds=60, least=4))) == 9

    def test_timing_waits_for_the_work(self) -> None:
        seconds, result = measure.timed(lambda: [__import__("time").sleep(0.02), "done"][1], CPU)
        assert result == "done"
        assert 0.02 <= seconds < 1

    def test_bandwidth_is_read_from_memory_and_not_from_a_cache(self, monkeypatch: pytest.MonkeyPatch) -> None:
        cache, threads = measure.last_level_cache(CPU), torch.get_num_threads()
        assert cache >= 1 << 18
        monkeypatch.setattr(measure, "LARGEST_BUFFER", 1 << 30)
        reader = measure.ReadBandwidth(CPU)
        assert reader.nbytes > cache
        parts = [part for share in reader._shares for part in share]
        assert sum(part.nbytes for part in parts) == measure.N_BUFFERS * reader.nbytes
        assert len({part.data_ptr() for part in parts}) == len(parts)
        assert torch.get_num_threads() == threads  # those of the reader are its own affair
        assert 1e8 < reader.once() < 1e13  # bytes a second: no unit is wrong by a thousand

    def test_the_matrix_rate_counts_two_operations_for_each_product(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(measure, "LARGEST_MATRIX", 512)
        monkeypatch.setattr(measure, "timed", lambda work, device: (0.5, work()))
        monkeypatch.setattr(measure, "LONG_ENOUGH", 1.0)
        assert measure.matrix_rates(CPU, torch.float32, repeats=2) == [2 * 512**3 / 0.5] * 2


class TestRandomModel:
    def test_the_same_seed_gives_the_same_model_and_another_seed_another(self) -> None:
        def logits(seed: int) -> torch.Tensor:
            llm = random_llm(tiny_config(), SHARED, device=CPU, dtype=torch.float32, max_seq_len=32, seed=seed)
            return llm.logits([1, 2, 3])

        assert torch.equal(logits(0), logits(0))
        assert not torch.allclose(logits(0), logits(1))
        assert logits(0).isfinite().all() and 0.1 < logits(0).std() < 10

    def test_shape_plan_dtype_and_batch(self) -> None:
        llm = random_llm(tiny_config(), SHARED, device=CPU, dtype=torch.bfloat16, max_seq_len=32, max_batch=3)
        names = dict(llm.model.named_parameters())
        assert "layers.1.attention.wq.weight" in names and "layers.2.attention.wq.weight" not in names
        assert {parameter.dtype for parameter in names.values()} == {torch.bfloat16}
        assert (llm.cache.batch, llm.cache.length, llm.dtype) == (3, 32, torch.bfloat16)

    def test_quantized(self) -> None:
        given = {"device": CPU, "dtype": torch.float32, "max_seq_len": 32}
        whole, small = (random_llm(tiny_config(), SHARED, quantize=quantize, **given) for quantize in (None, "int8"))  # type: ignore[arg-type]
        assert (whole.weight_format, small.weight_format) == ("fp32", "int8")
        assert small.runner.weight_bytes < 0.3 * whole.runner.weight_bytes
        assert (small.logits([1, 2, 3]) - whole.logits([1, 2, 3])).norm() < 0.05 * whole.logits([1, 2, 3]).norm()

    @pytest.mark.parametrize("tied", [True, False])
    @pytest.mark.parametrize("quantize", [None, "int8", "int4"])
    def test_the_weights_that_a_step_reads(self, quantize: str | None, tied: bool) -> None:
        """All but an embedding that is not the head too."""
        config = tiny_config(tie_embeddings=tied)
        llm = random_llm(config, SHARED, device=CPU, dtype=torch.bfloat16, max_seq_len=32, quantize=quantize)
        read = sum(t.nbytes for name, t in llm.model.state_dict().items() if tied or "tok_embeddings" not in name)
        settings = SimpleNamespace(opening=opening(config, SHARED, quantize=quantize), new_tokens=1)
        facts = Facts(llm.weight_bytes, memory_before=0, kv_itemsize=2)
        assert decode_cost(settings, Measured("", SHARED, facts, None), 0).weights == read  # type: ignore[arg-type]

    def test_text_needs_a_tokenizer(self) -> None:
        llm = random_llm(tiny_config(), SHARED, device=CPU, dtype=torch.float32, max_seq_len=32)
        with pytest.raises(MinisaError, match="token ids"):
            next(llm.generate("hello"))


class TestContender:
    def test_a_context_filled_in_parts_is_the_context(self) -> None:
        """Decoding at 9 leaves its tokens in the slots behind; the next fill must overwrite them."""
        tokens = list(range(1, 41))
        contender = Minisa(opening(plan=SHARED, batch=2))
        contender.prefill(tokens[::-1])
        for length in (9, 40):
            contender.fill(tokens[:length])
            contender.decode(length, 3)
        whole = Minisa(opening(plan=SHARED, batch=2))
        whole.fill(tokens)
        for mine, reference in ((contender, whole),):
            for name in ("keys", "values"):
                left, right = (getattr(c.llm.cache, name)[:, :, :, :40] for c in (mine, reference))
                assert right.std() > 0.01
                assert torch.allclose(left, right, atol=1e-5)

    @pytest.mark.parametrize("queued", [False, True])
    def test_decode_times_the_steps_asked_for_with_the_tokens_before_them_in_sight(
        self, queued: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        contender = Minisa(opening(batch=2))
        contender.llm.runner.asynchronous = queued  # type: ignore[misc]
        contender.fill(list(range(20)))
        seen: list[object] = []
        decode = contender.llm.runner.decode

        def spy(tokens: torch.Tensor, positions: torch.Tensor, cache: object, in_use: int) -> torch.Tensor:
            seen.append((positions.tolist(), in_use))
            return decode(tokens, positions, cache, in_use)  # type: ignore[arg-type]

        monkeypatch.setattr(contender.llm.runner, "decode", spy)
        monkeypatch.setattr("minisa.benchmark.contender.begin_reading", lambda tokens: lambda: seen.append("read"))
        assert len(contender.decode(20, 3)) == 3
        first, second, third = (([p, p], p + 1) for p in (20, 21, 22))
        lead_in = [first, first]
        if queued:
            assert seen == [*lead_in, first, second, "read", third, "read", "read"]
        else:
            assert seen == [*lead_in, first, "read", second, "read", third, "read"]

    def test_greedy_is_what_generate_does(self) -> None:
        contender = Minisa(opening(plan=SHARED))
        prompt = [7, 8, 9, 10]
        for _ in range(5):
            expected = int(contender.llm.logits(prompt)[-1].argmax())
            assert contender.greedy([7, 8, 9, 10], len(prompt) - 3)[-1] == expected
            prompt.append(expected)

    @pytest.mark.parametrize("flag", [None, True, False])
    def test_flags_reach_load(self, flag: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
        given: dict[str, object] = {}
        monkeypatch.setattr("minisa.benchmark.contender.load", lambda path, **options: given.update(options))
        opening(
            path=Path("model.gguf"), compile=flag, quantize="int8", kv_dtype=torch.float8_e4m3fn, batch=3, plan=SHARED
        ).llm()
        assert given == {
            "sa": SHARED, "device": "cpu", "dtype": "fp32", "max_seq_len": 128, "max_batch": 3, "quantize": "int8",
            "kv_dtype": "fp8", "compile": flag,
        }  # fmt: skip


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

    def test_ctrl_c_while_it_starts_is_not_lost(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The first one starts when a server has imported torch, which takes seconds."""
        start, started = BaseProcess.start, []

        def interrupted(process: BaseProcess) -> None:
            signal.raise_signal(signal.SIGINT)
            start(process)
            started.append(process)

        monkeypatch.setattr(BaseProcess, "start", interrupted)
        with pytest.raises(KeyboardInterrupt):
            Worker("one", Served, 1)
        (process,) = started  # whole, so that it can be ended
        process.terminate()
        process.join()

    def test_errors_come_back(self) -> None:
        worker = Worker("one", Served, 1)
        try:
            with pytest.raises(MinisaError, match="one: not today"):
                worker.call("refuse")
            with pytest.raises(MinisaError, match="one: out of memory"):
                worker.call("exhaust")
            with pytest.raises(RuntimeError, match="ZeroDivisionError: a bug"):
                worker.call("fail")
            with pytest.raises(MinisaError, match="one: its process ended with status -9"):
                worker.call("die")
        finally:
            worker.close()

    def test_what_cannot_be_opened(self) -> None:
        with pytest.raises(MinisaError, match="two: -1 is negative"):
            Worker("two", Served, -1)


class TestGGUFForLlamaCpp:
    CONFIG = tiny_config(rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 64))

    @pytest.fixture(autouse=True)
    def _package(self) -> None:
        pytest.importorskip("gguf", reason='needs pip install "minisa[peers]"')

    @pytest.mark.parametrize(("dtype", "kind"), [(torch.float32, "F32"), (torch.bfloat16, "BF16")])
    def test_weights_come_back_to_the_bit(self, dtype: torch.dtype, kind: str, tmp_path: Path) -> None:
        given = opening(self.CONFIG, dtype=dtype)
        write_gguf(given, tmp_path / "it.gguf")
        assert self.kinds(tmp_path / "it.gguf") == {kind}
        found = self.read(tmp_path / "it.gguf")
        for name, weight in given.weights(dtype).state_dict().items():
            assert torch.equal(found[name], weight.float()), name

    @pytest.mark.parametrize(
        ("quantize", "kinds", "limit"), [("int8", {"Q8_0"}, 0.01), ("int4", {"Q4_0", "Q8_0"}, 0.2)]
    )
    def test_quantized(self, quantize: str, kinds: set[str], limit: float, tmp_path: Path) -> None:
        given = opening(self.CONFIG, dtype=torch.bfloat16, quantize=quantize)
        write_gguf(given, tmp_path / "it.gguf")
        assert self.kinds(tmp_path / "it.gguf") == kinds
        found = self.read(tmp_path / "it.gguf")
        for name, weight in given.weights(torch.float32).state_dict().items():
            assert (found[name] - weight).norm() < limit * weight.norm(), name

    def test_the_config_comes_back(self, tmp_path: Path) -> None:
        write_gguf(opening(self.CONFIG), tmp_path / "it.gguf")
        config = open_checkpoint(tmp_path / "it.gguf").config
        assert torch.allclose(rope_frequencies(config), rope_frequencies(self.CONFIG), rtol=1e-6)
        for key in ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim", "vocab_size", "max_seq_len"):
            assert getattr(config, key) == getattr(self.CONFIG, key)

    def test_a_checkpoint_of_the_right_type_is_taken_as_it_is(self, tmp_path: Path) -> None:
        config = tiny_config()
        for kind in ("F32", "Q8_0"):
            write_tiny_gguf(tmp_path / f"{kind}.gguf", config, random_weights(config), kind)
        full, eighth = tmp_path / "F32.gguf", tmp_path / "Q8_0.gguf"
        assert own_gguf(opening(config, path=full)) == full
        assert own_gguf(opening(config, path=eighth)) is None
        assert own_gguf(opening(config, path=eighth, quantize="int8")) == eighth
        assert own_gguf(opening(config)) is None

    def kinds(self, path: Path) -> set[str]:
        return {info.type.name for info in read_gguf(path).tensors if len(info.shape) > 1}

    def read(self, path: Path) -> dict[str, torch.Tensor]:
        checkpoint = open_checkpoint(path)
        model = Transformer(checkpoint.config, SharingPlan.none(checkpoint.config.n_layers))
        load_weights(model, checkpoint, device="cpu", dtype=torch.float32)
        return model.state_dict()
