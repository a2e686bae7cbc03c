"""Rivals of attention sharing: against models written out, in one go and step by step, and the choice of layers."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path

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
from minisa.study.cheapest import KEPT, Step, cheapest, extensions
from minisa.study.loss import token_losses
from minisa.study.rivals import Rival, altered, round_to_int8, slot_bytes
from minisa.study.variants import parse_variants
from tests.commands import Ran
from tests.loadable import N_TOKENS, loadable_gguf
from tests.models import N_LAYERS, PLANS, SIX_LAYERS, build_model, in_one_go, random_tokens
from tests.tiny import tiny_config

RIVALS = ["drop:2", "drop:0,5", "cla:1:2", "cla:0:3,4:5", "cla:1:2-4", "kv-int8", "drop:3+kv-int8", "cla:1:4+kv-int8"]
WINDOWED = tiny_config(n_layers=N_LAYERS, sliding_window=7)


def int8(x: Tensor) -> Tensor:
    """Vector by vector, number by number."""
    out = x.clone(memory_format=torch.contiguous_format)
    for vector in out.view(-1, x.shape[-1]):
        scale = float(torch.tensor(max(abs(float(value)) for value in vector) / 127).half())
        for d, value in enumerate(vector.tolist()):
            vector[d] = scale * max(-127, min(127, round(value / scale)))
    return out


def written_out(model: Transformer, tokens: Tensor, rival: Rival) -> Tensor:
    """Logits [T, vocab_size] of tokens [T], from the definition of each rival."""
    config = model.config
    x, length = model.tok_embeddings.weight[tokens], len(tokens)
    angles = model.angles(torch.arange(length)[None])
    visible = torch.ones(length, length, dtype=torch.bool).tril()
    if config.sliding_window:
        visible &= ~torch.ones(length, length, dtype=torch.bool).tril(-config.sliding_window)
    cached = {}
    for i, layer in enumerate(model.layers):
        if i not in rival.dropped:
            normed = layer.attention_norm(x)
            q, k, v = (
                F.linear(normed, projection.weight).unflatten(-1, (-1, config.head_dim)).transpose(0, 1)
                for projection in (layer.attention.wq, layer.attention.wk, layer.attention.wv)
            )
            q, k = (apply_rope(heads[None], angles)[0] for heads in (q, k))
            cached[i] = (int8(k), int8(v)) if rival.int8 else (k, v)
            k, v = (heads.repeat_interleave(config.group_size, 0) for heads in cached[rival.borrowed.get(i, i)])
            scores = (q @ k.mT / config.head_dim**0.5).masked_fill(~visible, -torch.inf)
            x = x + F.linear((scores.softmax(-1) @ v).transpose(0, 1).flatten(1), layer.attention.wo.weight)
        x = x + layer.feed_forward(layer.ffn_norm(x))
    return model.head(model.norm(x))


@pytest.mark.parametrize("config", [SIX_LAYERS, WINDOWED], ids=["full", "window"])
@pytest.mark.parametrize("text", RIVALS)
def test_is_what_its_definition_says(text: str, config: ModelConfig) -> None:
    model, tokens, rival = build_model(config, PLANS["none"]), random_tokens(config, 2, 20), Rival.parse(text, N_LAYERS)
    plain = in_one_go(model, tokens)
    with altered(model, rival):
        found = in_one_go(model, tokens)
    for row in range(2):
        assert (found[row] - written_out(model, tokens[row], rival)).abs().max() < 1e-4
    assert (found - plain).abs().max() > 1e-3
    assert torch.equal(in_one_go(model, tokens), plain)  # and it is gone afterwards


@pytest.mark.parametrize("text", RIVALS)
def test_step_by_step_is_in_one_go(text: str) -> None:
    model, tokens = build_model(SIX_LAYERS, PLANS["none"]), random_tokens(SIX_LAYERS, 2, 24)
    with altered(model, Rival.parse(text, N_LAYERS)):
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
    with altered(model, Rival(int8=True)):
        rounded = in_one_go(model, tokens)
    assert 1e-4 < (rounded - plain).abs().max() < 0.5
    with pytest.raises(MinisaError, match="give them without a plan"), altered(model, Rival.parse("drop:1", N_LAYERS)):
        pass


def test_the_model_is_itself_again_after_an_error() -> None:
    model, tokens = build_model(SIX_LAYERS, PLANS["none"]), random_tokens(SIX_LAYERS, 1, 9)
    plain = in_one_go(model, tokens)
    with pytest.raises(ZeroDivisionError), altered(model, Rival.parse("drop:1+kv-int8", N_LAYERS)):
        raise ZeroDivisionError
    assert torch.equal(in_one_go(model, tokens), plain)


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

    def test_the_error_is_half_a_step(self) -> None:
        x = torch.randn(100, 64, generator=torch.Generator().manual_seed(0))
        step = x.abs().amax(-1, keepdim=True) / 127
        assert ((round_to_int8(x) - x).abs() <= 0.51 * step + 127 * step * 2**-11).all()

    def test_nothing_stays_nothing(self) -> None:
        assert torch.equal(round_to_int8(torch.zeros(2, 4)), torch.zeros(2, 4))
        assert round_to_int8(torch.full((1, 4), 1e-12)).isfinite().all()


class TestBytes:
    def test_of_sharing_are_the_engine_s_formula(self) -> None:
        for plan in PLANS.values():
            assert slot_bytes(SIX_LAYERS, plan) == kv_bytes(SIX_LAYERS, plan, 1, 2)

    def test_of_rivals(self) -> None:
        """6 layers, 2 heads of 16: 64 bytes a layer for keys and as many for values."""
        none = PLANS["none"]
        expected = {"drop:2,4": 4 * 128, "cla:1:2,3:5": 4 * 128, "kv-int8": 6 * 2 * 2 * 18, "drop:0+kv-int8": 5 * 72}
        for text, n_bytes in expected.items():
            assert slot_bytes(SIX_LAYERS, none, Rival.parse(text, N_LAYERS)) == n_bytes
        assert slot_bytes(SIX_LAYERS, PLANS["span"], Rival(int8=True)) == (12 - 3) * 2 * 18

    def test_borrowed_keys_and_dropped_layers_write_nothing(self) -> None:
        model, tokens = build_model(SIX_LAYERS, PLANS["none"]), random_tokens(SIX_LAYERS, 1, 8)
        cache = StaticCache.allocate(SIX_LAYERS, PLANS["none"], max_seq_len=8)
        with altered(model, Rival.parse("drop:1", N_LAYERS)), altered(model, Rival.parse("cla:2:4", N_LAYERS)):
            model(tokens, torch.arange(8)[None], cache)
        written = [bool(cache.keys[i].any()) and bool(cache.values[i].any()) for i in range(N_LAYERS)]
        assert written == [True, False, True, True, False, True]
        assert not cache.keys[[1, 4]].any() and not cache.values[[1, 4]].any()


@pytest.mark.parametrize("text", RIVALS)
def test_notation_reads_what_it_writes(text: str) -> None:
    rival = Rival.parse(text, N_LAYERS)
    assert Rival.parse(str(rival), N_LAYERS) == rival


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prune:2", "'prune:2' is not known: expected drop:LAYER"),
        ("drop:", "expected layers"),
        ("drop:1-2", "expected layers"),
        pytest.param("drop:" + "9" * 5000, "expected layers", id="5,000 digits"),
        ("drop:6", "layer 6 is outside the model"),
        ("cla:2:1", "cannot follow"),
        ("cla:1:2,2:3", "itself follows"),
        ("drop:1+cla:2:3", "only kv-int8 goes with another"),
        ("drop:1+drop:2", "only kv-int8 goes with another"),
        ("kv-int8:3", "is not known"),
        ("sa:2+kv-int4", "2[+]kv-int4"),
    ],
)
def test_notation_that_is_none(text: str, message: str) -> None:
    with pytest.raises(MinisaError, match=message):
        parse_variants([], [text], SIX_LAYERS, None)


class TestCheapest:
    @pytest.mark.parametrize("kind", ["drop", "cla"])
    @pytest.mark.parametrize(
        ("config", "seed"), [(SIX_LAYERS, 0), (WINDOWED, 0), (WINDOWED, 2)], ids=["full", "window", "other weights"]
    )
    def test_is_the_best_of_all_by_the_loss_of_the_whole_model(self, kind: str, config: ModelConfig, seed: int) -> None:
        """With the other weights a layer is chosen to borrow keys that trials of earlier layers have changed."""
        model, windows = build_model(config, PLANS["none"], seed=seed), random_tokens(config, 5, 24)

        def loss(rival: Rival) -> float:
            with altered(model, rival):
                return token_losses(model, windows).double().mean().item()

        steps = list(cheapest(model, windows, kind, 3, batch=2))
        assert len(steps) == 4
        assert steps[0].loss == pytest.approx(loss(Rival()), abs=1e-5)
        for before, after in itertools.pairwise(steps):
            tried = extensions(before.rival, kind, set(range(N_LAYERS)), N_LAYERS)
            losses = {str(rival): loss(rival) for _, rival in tried}
            assert losses[str(after.rival)] == pytest.approx(min(losses.values()), abs=1e-5)
            assert after.loss == pytest.approx(losses[str(after.rival)], abs=1e-5)
        assert loss(Rival()) == pytest.approx(steps[0].loss, abs=1e-6)  # the model is as before

    def test_extensions_are_rivals_that_can_be(self) -> None:
        rival = Rival(borrowed={3: 1})
        found = {str(candidate) for _, candidate in extensions(rival, "cla", set(range(6)), 6)}
        assert found == {
            *("cla:0:2,1:3", "cla:1:2,1:3", "cla:1:3,1:4", "cla:1:3,2:4", "cla:1:3,2:5", "cla:1:3,4:5"),
        }  # not 1, which 3 borrows from; not from 3, which has none of its own
        for candidate in found:
            Rival.parse(candidate, 6)

    def test_only_the_best_of_the_first_round_are_tried_again(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(cheapest_module, "KEPT", 2)
        model, windows = build_model(SIX_LAYERS, PLANS["none"]), random_tokens(SIX_LAYERS, 2, 16)
        calls: list[tuple[int, int]] = []
        steps = list(cheapest(model, windows, "drop", 5, progress=lambda done, total: calls.append((done, total))))
        assert len(steps) == 3  # plain, one, two: then none of the two is left
        assert len(calls) == N_LAYERS + 1


def test_the_command_prints_and_writes_what_is_chosen(
    run_main: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loadable_gguf(tmp_path / "tiny.gguf", tiny_config(vocab_size=N_TOKENS, tie_embeddings=True))
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on a quiet red roof in town. " * 20)

    def run(*flags: object) -> Ran:
        return run_main(cli.main, "minisa", "rivals", "--model", model, "--device", "cpu", "--dtype", "fp32", *flags)

    llm = load(model, dtype="fp32", device="cpu", compile=False)
    ids = torch.tensor(llm.tokenizer.encode(text.read_text())[:120]).view(3, 40)
    for kind in ("drop", "cla"):
        status, out, err = run(kind, 2, "--text", text, "--length", 40, "--limit", 3, "--json", tmp_path / "r.json")
        assert status == 0, err
        plain, *steps = cheapest(llm.model, ids, kind, 2)
        record = json.loads((tmp_path / "r.json").read_text())
        assert (record["settings"]["windows"], record["settings"]["length"]) == (3, 40)
        assert [step["rival"] for step in record["steps"]] == [str(step.rival) for step in steps]
        assert [step["kv_saved"] for step in record["steps"]] == [0.25, 0.5]
        ratios = [math.exp(step.loss - plain.loss) for step in steps]
        assert [step["ratio"] for step in record["steps"]] == pytest.approx(ratios, rel=1e-5)
        for line, step, ratio in zip(out.splitlines(), steps, ratios, strict=True):
            assert line.startswith(f"{step.rival}  KV saved") and line.endswith(f"× {ratio:.3f}")
    rounded = ("--dtype", "bf16", "--quantize", "int8", "--json", tmp_path / "rounded.json")
    status, _, err = run("drop", 1, "--text", text, "--length", 40, "--limit", 3, *rounded)
    assert status == 0, err
    found = json.loads((tmp_path / "rounded.json").read_text())
    assert (found["settings"]["dtype"], found["settings"]["quantize"]) == ("bf16", "int8")
    plain, first = cheapest(llm.model, ids, "drop", 1)
    assert found["steps"][0]["ratio"] != pytest.approx(math.exp(first.loss - plain.loss), rel=1e-6)
    status, _, err = run("drop", 5, "--text", text, "--length", 40, "--limit", 1)
    assert status == 0 and "5 layers were asked for, no more than 4 can be chosen" in err
    status, _, err = run("drop", KEPT + 1, "--text", text)
    assert status == 2 and f"not in the range 1<=x<={KEPT}" in err
    assert f"{KEPT} at most" in run("--help")[1]
    steps = [Step(Rival(), 1.0), Step(Rival.parse("drop:2", 4), 1000.0)]
    monkeypatch.setattr("minisa.study.rivals_command.cheapest", lambda *_, **__: iter(steps))
    status, out, err = run("drop", 1, "--text", text, "--length", 40, "--json", tmp_path / "r.json")
    assert status == 0 and out.endswith("× inf\n"), err
    assert json.loads((tmp_path / "r.json").read_text())["steps"][0]["ratio"] is None
    for flags, message in (((), "'prune' is not one of"), (("--device", "tpu"), "tpu")):
        status, _, err = run("drop" if flags else "prune", 2, "--text", text, *flags)
        assert status == 2 and message in err
