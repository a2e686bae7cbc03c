"""Baselines of attention sharing: against models written out, in one go and step by step, and the choice of layers."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minisa import cli, load
from minisa.cache import StaticCache
from minisa.config import ModelConfig
from minisa.costs import kv_bytes
from minisa.errors import MinisaError
from minisa.model import Transformer
from minisa.rope import apply_rope
from minisa.runners.eager import TorchRunner, prefill_chunks
from minisa.study import cheapest as cheapest_module
from minisa.study.baselines import Baseline, altered, round_to_int8, slot_bytes
from minisa.study.cheapest import KEPT, cheapest, extensions
from minisa.study.loss import token_losses
from tests.commands import Ran
from tests.loadable import N_TOKENS, loadable_gguf
from tests.models import N_LAYERS, PLANS, SIX_LAYERS, build_model, in_one_go, random_tokens
from tests.tiny import tiny_config

BASELINES = [
    "drop:2",
    "drop:0,5",
    "cla:1:2",
    "cla:0:3,4:5",
    "cla:1:2-4",
    "kv-int8",
    "drop:3+kv-int8",
    "cla:1:4+kv-int8",
]
WINDOWED = tiny_config(n_layers=N_LAYERS, sliding_window=7)


def int8(x: Tensor) -> Tensor:
    """Vector by vector, number by number."""
    out = x.clone(memory_format=torch.contiguous_format)
    for vector in out.view(-1, x.shape[-1]):
        scale = float(torch.tensor(max(abs(float(value)) for value in vector) / 127).half())
        for d, value in enumerate(vector.tolist()):
            vector[d] = scale * max(-127, min(127, round(value / scale)))
    return out


def written_out(model: Transformer, tokens: Tensor, baseline: Baseline) -> Tensor:
    """Logits [T, vocab_size] of tokens [T], from the definition of each baseline."""
    config = model.config
    x, length = model.tok_embeddings.weight[tokens], len(tokens)
    angles = model.angles(torch.arange(length)[None])
    visible = torch.ones(length, length, dtype=torch.bool).tril()
    if config.sliding_window:
        visible &= ~torch.ones(length, length, dtype=torch.bool).tril(-config.sliding_window)
    cached = {}
    for i, layer in enumerate(model.layers):
        if i not in baseline.dropped:
            normed = layer.attention_norm(x)
            q, k, v = (
                F.linear(normed, projection.weight).unflatten(-1, (-1, config.head_dim)).transpose(0, 1)
                for projection in (layer.attention.wq, layer.attention.wk, layer.attention.wv)
            )
            q, k = (apply_rope(heads[None], angles)[0] for heads in (q, k))
            cached[i] = (int8(k), int8(v)) if baseline.int8 else (k, v)
            k, v = (heads.repeat_interleave(config.group_size, 0) for heads in cached[baseline.borrowed.get(i, i)])
            scores = (q @ k.mT / config.head_dim**0.5).masked_fill(~visible, -torch.inf)
            x = x + F.linear((scores.softmax(-1) @ v).transpose(0, 1).flatten(1), layer.attention.wo.weight)
        x = x + layer.feed_forward(layer.ffn_norm(x))
    return model.head(model.norm(x))


@pytest.mark.parametrize("config", [SIX_LAYERS, WINDOWED], ids=["full", "window"])
@pytest.mark.parametrize("text", BASELINES)
def test_is_what_its_definition_says(text: str, config: ModelConfig) -> None:
    model, tokens, baseline = (
        build_model(config, PLANS["none"]),
        random_tokens(config, 2, 20),
        Baseline.parse(text, N_LAYERS),
    )
    plain = in_one_go(model, tokens)
    with altered(model, baseline):
        found = in_one_go(model, tokens)
    for row in range(2):
        assert (found[row] - written_out(model, tokens[row], baseline)).abs().max() < 1e-4
    assert (found - plain).abs().max() > 1e-3
    assert torch.equal(in_one_go(model, tokens), plain)  # and it is gone afterwards
    with pytest.raises(ZeroDivisionError), altered(model, baseline):
        raise ZeroDivisionError
    assert torch.equal(in_one_go(model, tokens), plain)


@pytest.mark.parametrize("text", BASELINES)
def test_step_by_step_is_in_one_go(text: str) -> None:
    model, tokens = build_model(SIX_LAYERS, PLANS["none"]), random_tokens(SIX_LAYERS, 2, 24)
    with altered(model, Baseline.parse(text, N_LAYERS)):
        expected = in_one_go(model, tokens)
        cache = StaticCache.allocate(SIX_LAYERS, PLANS["none"], batch=2, max_seq_len=24)
        list(prefill_chunks(model, tokens[:, :10], 0, cache))
        for t in range(10, 24):
            step = TorchRunner(model).decode(tokens[:, t], torch.tensor([t, t]), cache, t + 1)
            assert (step - expected[:, t]).abs().max() < 1e-4


def test_eight_bits_go_with_a_plan() -> None:
    plan = PLANS["head maps"]
    model, tokens = build_model(SIX_LAYERS, plan), random_tokens(SIX_LAYERS, 2, 20)
    plain = in_one_go(model, tokens)
    with altered(model, Baseline(int8=True)):
        rounded = in_one_go(model, tokens)
    assert 1e-4 < (rounded - plain).abs().max() < 0.5
    with (
        pytest.raises(MinisaError, match="give them without a plan"),
        altered(model, Baseline.parse("drop:1", N_LAYERS)),
    ):
        pass


class TestEightBits:
    def test_number_by_number(self) -> None:
        x = torch.randn(3, 2, 5, 16, generator=torch.Generator().manual_seed(0)) * 3
        assert torch.allclose(round_to_int8(x), int8(x), atol=1e-6)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_rounding_again_changes_nothing(self, dtype: torch.dtype) -> None:
        """So rounding at every step is what storing eight bits once would be."""
        x = (torch.randn(500, 64, generator=torch.Generator().manual_seed(0)) * 4).to(dtype)
        once = round_to_int8(x)
        assert torch.equal(round_to_int8(once), once)
        assert not torch.equal(once, x)

    def test_zeros_stay_zeros(self) -> None:
        assert torch.equal(round_to_int8(torch.zeros(2, 4)), torch.zeros(2, 4))
        assert round_to_int8(torch.full((1, 4), 1e-12)).isfinite().all()


class TestBytes:
    def test_of_sharing_are_the_engine_s_formula(self) -> None:
        for plan in PLANS.values():
            assert slot_bytes(SIX_LAYERS, plan) == kv_bytes(SIX_LAYERS, plan, 1, 2)

    def test_of_baselines(self) -> None:
        """6 layers, 2 heads of 16: 64 bytes a layer for keys and as many for values."""
        none = PLANS["none"]
        expected = {"drop:2,4": 4 * 128, "cla:1:2,3:5": 4 * 128, "kv-int8": 6 * 2 * 2 * 18, "drop:0+kv-int8": 5 * 72}
        for text, n_bytes in expected.items():
            assert slot_bytes(SIX_LAYERS, none, Baseline.parse(text, N_LAYERS)) == n_bytes
        assert slot_bytes(SIX_LAYERS, PLANS["span"], Baseline(int8=True)) == (12 - 3) * 2 * 18

    def test_borrowed_keys_and_dropped_layers_write_nothing(self) -> None:
        model, tokens = build_model(SIX_LAYERS, PLANS["none"]), random_tokens(SIX_LAYERS, 1, 8)
        cache = StaticCache.allocate(SIX_LAYERS, PLANS["none"], max_seq_len=8)
        with altered(model, Baseline.parse("drop:1", N_LAYERS)), altered(model, Baseline.parse("cla:2:4", N_LAYERS)):
            model(tokens, torch.arange(8)[None], cache)
        written = [bool(cache.keys[i].any()) and bool(cache.values[i].any()) for i in range(N_LAYERS)]
        assert written == [True, False, True, True, False, True]
        assert not cache.keys[[1, 4]].any() and not cache.values[[1, 4]].any()


@pytest.mark.parametrize("text", BASELINES)
def test_notation_reads_what_it_writes(text: str) -> None:
    baseline = Baseline.parse(text, N_LAYERS)
    assert Baseline.parse(str(baseline), N_LAYERS) == baseline


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prune:2", "expected drop:LAYER"),
        ("drop:", "expected layers"),
        ("drop:1-2", "expected layers"),
        ("drop:6", "expected layers of the model, 0 to 5"),
        ("cla:2:1", "cannot follow"),
        ("cla:1:2,2:3", "itself follows"),
        ("drop:1+cla:2:3", "expected drop:LAYER"),
        ("drop:1+drop:2", "expected drop:LAYER"),
        ("kv-int8:3", "expected drop:LAYER"),
        ("drop:2+kv-int4", "expected drop:LAYER"),
    ],
)
def test_notation_that_is_refused(text: str, message: str) -> None:
    with pytest.raises(MinisaError, match=message):
        Baseline.parse(text, N_LAYERS)


class TestCheapest:
    @pytest.mark.parametrize("kind", ["drop", "cla"])
    def test_is_the_best_of_all_by_the_loss_of_the_whole_model(self, kind: str) -> None:
        model, windows = build_model(WINDOWED, PLANS["none"]), random_tokens(WINDOWED, 5, 24)

        def loss(baseline: Baseline) -> float:
            with altered(model, baseline):
                return token_losses(model, windows).double().mean().item()

        steps = list(cheapest(model, windows, kind, 3))
        assert len(steps) == 4
        for (before, _), (after, found) in itertools.pairwise(steps):
            losses = {str(each): loss(each) for _, each in extensions(before, kind, set(range(N_LAYERS)))}
            assert found == losses[str(after)] == min(losses.values())
        assert loss(Baseline()) == steps[0][1]  # the model is as before

    def test_extensions_are_baselines_that_can_be(self) -> None:
        baseline = Baseline(borrowed={3: 1})
        found = {str(candidate) for _, candidate in extensions(baseline, "cla", set(range(6)))}
        assert found == {
            *("cla:0:2,1:3", "cla:1:2,1:3", "cla:1:3,1:4", "cla:1:3,2:4", "cla:1:3,2:5", "cla:1:3,4:5"),
        }  # not 1, which 3 borrows from; not from 3, which has none of its own
        for candidate in found:
            Baseline.parse(candidate, 6)

    def test_only_the_best_of_the_first_round_are_tried_again(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(cheapest_module, "KEPT", 2)
        model, windows = build_model(SIX_LAYERS, PLANS["none"]), random_tokens(SIX_LAYERS, 2, 16)
        rounds: list[float] = []
        steps = list(cheapest(model, windows, "drop", 5, progress=rounds.append))
        assert len(steps) == 3  # plain, one, two: then none of the two is left
        assert len(rounds) == N_LAYERS + 1 and rounds[-1] == 2


def test_the_command_prints_and_writes_what_is_chosen(run_main: Callable[..., Ran], tmp_path: Path) -> None:
    model = loadable_gguf(tmp_path / "tiny.gguf", tiny_config(vocab_size=N_TOKENS, tie_embeddings=True))
    text, file = tmp_path / "text.txt", tmp_path / "r.json"
    text.write_text("the cat sat on a quiet red roof in town. " * 20)

    def run(*flags: object) -> tuple[Ran, dict[str, Any]]:
        common = ("--model", model, "--device", "cpu", "--text", text, "--length", 40, "--limit", 3, "--json", file)
        ran = run_main(cli.main, "minisa", "baselines", *common, *flags)
        return ran, json.loads(file.read_text()) if ran.status == 0 else {}

    llm = load(model, dtype="fp32", device="cpu", compile=False)
    ids = torch.tensor(llm.tokenizer.encode(text.read_text())[:120]).view(3, 40)
    for kind in ("drop", "cla"):
        (_, out, _), record = run(kind, 2, "--dtype", "fp32")
        (_, plain), *steps = cheapest(llm.model, ids, kind, 2)
        assert (record["settings"]["windows"], record["settings"]["length"]) == (3, 40)
        assert [step["baseline"] for step in record["steps"]] == [str(baseline) for baseline, _ in steps]
        assert [step["kv_saved"] for step in record["steps"]] == [0.25, 0.5]
        ratios = [math.exp(loss - plain) for _, loss in steps]
        assert [step["ratio"] for step in record["steps"]] == pytest.approx(ratios, rel=1e-5)
        for line, (baseline, _), ratio in zip(out.splitlines(), steps, ratios, strict=True):
            assert line.startswith(f"{baseline}  KV saved") and line.endswith(f"× {ratio:.3f}")
    _, exact = run("drop", 1, "--dtype", "fp32")
    _, rounded = run("drop", 1, "--dtype", "bf16", "--quantize", "int8")
    assert (rounded["settings"]["dtype"], rounded["settings"]["quantize"]) == ("bf16", "int8")
    assert rounded["steps"][0]["ratio"] != pytest.approx(exact["steps"][0]["ratio"], rel=1e-6)
    assert "5 layers were asked for, 4 can be chosen" in run("drop", 5)[0].err
    assert f"{KEPT} at most" in run("drop", 1, "--help")[0].out
    for flags, message in ((("prune", 1), "'prune' is not one of"), (("drop", 1, "--device", "tpu"), "tpu")):
        (status, _, err), _ = run(*flags)
        assert status == 2 and message in err
