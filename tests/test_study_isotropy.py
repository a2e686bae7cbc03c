"""isotropy against the same measures in plain loops, and its command line."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from minisa import cli, load
from minisa.attention import REFERENCE
from minisa.config import ModelConfig
from minisa.errors import MinisaError
from minisa.model import Transformer
from minisa.sharing import SharingPlan
from minisa.study import isotropy
from minisa.study.isotropy import similarity
from tests.commands import Ran
from tests.loadable import N_TOKENS, loadable_gguf
from tests.models import build_model, in_one_go, random_tokens
from tests.tiny import tiny_config

CONFIG = tiny_config(n_layers=3, n_heads=4, n_kv_heads=2)
NONE = SharingPlan.none(3)


def attention_weights(model: Transformer, window: Tensor) -> Tensor:
    """[L, H, T, T]: from a follower's point of view, layer by layer, out of the reference backend."""
    found = []
    lead = REFERENCE.lead
    for layer in model.layers:
        layer.backend = replace(
            layer.backend, lead=lambda q, k, v, mask: found.append(lead(q, k, v, mask)[1]) or lead(q, k, v, mask)
        )
    in_one_go(model, window[None])
    return torch.cat(found).double()


def cosine(pairs: list[tuple[float, float]]) -> float:
    dot = sum(a * b for a, b in pairs)
    return dot / math.sqrt(sum(a * a for a, _ in pairs) * sum(b * b for _, b in pairs))


def jensen_shannon(p: list[float], q: list[float]) -> float:
    def kl(a: list[float], b: list[float]) -> float:
        return sum(x * math.log2(x / y) for x, y in zip(a, b, strict=True) if x > 0)

    middle = [(x + y) / 2 for x, y in zip(p, q, strict=True)]
    return (kl(p, middle) + kl(q, middle)) / 2


@pytest.mark.parametrize(
    "config",
    [CONFIG, tiny_config(n_layers=3, n_heads=4, n_kv_heads=2, sliding_window=5)],
    ids=["full", "sliding window"],
)
@pytest.mark.parametrize("sink", [True, False])
def test_every_entry_by_its_definition(config: ModelConfig, sink: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isotropy, "BLOCK", 5)  # several blocks, the last of them shorter
    windows = random_tokens(config, 2, 12)
    found = similarity(build_model(config, NONE), windows)[0 if sink else 1]
    weights = [attention_weights(build_model(config, NONE, "reference"), window).tolist() for window in windows]
    first = 0 if sink else 1
    places = [(w, t, s) for w in range(2) for t in range(12) for s in range(first, t + 1)]

    def head(layer: int, h: int) -> list[float]:
        return [weights[w][layer][h][t][s] for w, t, s in places]

    def rows(layer: int, h: int) -> list[list[float]]:
        cut = [weights[w][layer][h][t][first : t + 1] for w in range(2) for t in range(first, 12)]
        return [[x / sum(row) for x in row] for row in cut]

    for leader in range(3):
        for follower in range(3):
            heads = [(head(leader, h), head(follower, h)) for h in range(4)]
            means = [[sum(column) / 4 for column in zip(*side, strict=True)] for side in zip(*heads, strict=True)]
            pooled = cosine(list(zip(*means, strict=True)))
            assert found.pooled[leader, follower].item() == pytest.approx(pooled, abs=1e-5)
            table = [
                [cosine(list(zip(a, b, strict=True))) for b in (side[1] for side in heads)]
                for a in (side[0] for side in heads)
            ]
            same = sum(table[h][h] for h in range(4)) / 4
            best = sum(max(table[j][h] for j in range(4)) for h in range(4)) / 4
            assert found.same_head[leader, follower].item() == pytest.approx(same, abs=1e-5)
            assert found.best_head[leader, follower].item() == pytest.approx(best, abs=1e-5)
            if follower < leader:
                assert math.isnan(found.js[leader, follower].item())
                continue
            divergence = 0.0
            for h in range(4):
                mine = rows(follower, h)
                divergence += min(
                    sum(jensen_shannon(p, q) for p, q in zip(rows(leader, j), mine, strict=True)) / len(mine)
                    for j in range(4)
                )
            assert found.js[leader, follower].item() == pytest.approx(divergence / 4, abs=1e-5)


def test_identical_layers_are_identical() -> None:
    model = build_model(CONFIG, NONE)
    for layer in model.layers[1:]:  # they do nothing to x, and then all see the same
        layer.load_state_dict(model.layers[0].state_dict())
    for layer in model.layers:
        layer.attention.wo.weight.zero_()
        layer.feed_forward.w2.weight.zero_()
    for found in similarity(model, random_tokens(CONFIG, 1, 20)):
        for matrix in (found.pooled, found.same_head, found.best_head):
            assert torch.allclose(matrix, torch.ones(3, 3, dtype=torch.float64), atol=1e-5)
        assert found.js.nan_to_num().abs().max() < 1e-5


def test_windows_are_taken_together_and_counted() -> None:
    model, windows = build_model(CONFIG, NONE), random_tokens(CONFIG, 3, 16)
    calls: list[int] = []
    together, _ = similarity(model, windows, calls.append)
    assert calls == [1, 2, 3]
    singly = torch.stack([similarity(model, window[None])[0].js for window in windows])
    assert torch.all(together.js.nan_to_num() >= singly.mean(0).nan_to_num() - 1e-9)  # one best head for all of them
    assert not torch.allclose(together.pooled, similarity(model, windows[:1])[0].pooled, atol=1e-4)


def test_a_model_whose_numbers_overflow_is_like_no_other() -> None:
    model = build_model(CONFIG, NONE)
    model.layers[0].feed_forward.w2.weight.fill_(float("inf"))
    with pytest.raises(MinisaError, match="predictions are no numbers"):
        similarity(model, random_tokens(CONFIG, 1, 20))


def test_the_command_prints_writes_and_draws_what_is_measured(run_main: Callable[..., Ran], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason='needs pip install "minisa[plots]"')
    tiny_gguf = loadable_gguf(tmp_path / "tiny.gguf", tiny_config(vocab_size=N_TOKENS, tie_embeddings=True))
    run_isotropy = partial(run_main, cli.main, "minisa", "isotropy", "--model", tiny_gguf, "--device", "cpu")
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on a quiet red roof in town. " * 20)
    status, out, err = run_isotropy(
        *("--text", text, "--length", 40, "--limit", 3, "--dtype", "fp32"),
        *("--json", tmp_path / "r.json", "--plot", tmp_path / "r.png"),
    )
    assert status == 0, err
    record = json.loads((tmp_path / "r.json").read_text())
    assert record["settings"]["windows"] == 3 and record["settings"]["length"] == 40
    llm = load(tiny_gguf, dtype="fp32", device="cpu", compile=False)
    ids = torch.tensor(llm.tokenizer.encode(text.read_text())[:120]).view(3, 40)
    whole, rest = similarity(llm.model, ids)
    for part, found in (("with_sink", whole), ("without_sink", rest)):
        for name, matrix in record[part].items():
            expected = getattr(found, name)
            given = torch.tensor([[math.nan if x is None else x for x in row] for row in matrix], dtype=torch.float64)
            assert torch.allclose(given, expected, atol=2e-6, equal_nan=True)
    last = out.splitlines()[-1].split()
    best = whole.pooled[:3, 3].max().item()
    assert last[:3] == ["3", str(int(whole.pooled[:3, 3].argmax())), f"{best:.3f}"]
    lowest = rest.js[:3, 3].min().item()
    assert last[-2:] == [str(int(rest.js[:3, 3].argmin())), f"{lowest:.3f}"]
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
    rounded = run_isotropy("--text", text, "--length", 40, "--limit", 3, "--quantize", "int4", "--dtype", "fp32")
    assert rounded[0] == 0 and rounded[1] != out
    assert "· fp32" in out and "· bf16" in run_isotropy("--text", text, "--length", 40, "--dtype", "bf16")[1]
    for flags, says in (
        (("--text", text, "--device", "tpu"), "tpu"),
        (("--text", text, "--length", 100_000), "windows of 100000 tokens: expected 2 to 128"),
        (("--text", tmp_path / "none.txt", "--length", 40), "cannot read the text"),
    ):
        status, _, err = run_isotropy(*flags)
        assert status == 2 and says in err
