"""Windows of text, and the losses of their tokens."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

from minisa.errors import MinisaError
from minisa.sharing import SharingPlan
from minisa.study.loss import perplexity, token_losses
from minisa.study.text import echoing, read_text, sample, sha256_of, windows
from tests.models import PLANS, SIX_LAYERS, build_model, in_one_go, random_tokens


class Bytes:
    """A tokenizer whose tokens are bytes; BOS, if any, is 255."""

    def __init__(self, add_bos: bool = False) -> None:
        self.bos_ids = [255] if add_bos else []

    def encode(self, text: str) -> list[int]:
        return list(text.encode())


class TinyLLM:
    """As much of LLM as the studies of text look at."""

    config = SIX_LAYERS

    def __init__(self, add_bos: bool = False) -> None:
        self.tokenizer = Bytes(add_bos)


def test_windows_are_the_text_cut_up(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("abcdefghijk")
    assert windows(TinyLLM(), path, 4).tolist() == [list(b"abcd"), list(b"efgh")]
    assert windows(TinyLLM(), path, 3, limit=1).tolist() == [list(b"abc")]
    assert windows(TinyLLM(add_bos=True), path, 5).tolist() == [[255, *b"abcd"], [255, *b"efgh"]]


def test_what_is_wrong_with_a_text_is_said(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(b"caf\xe9 noir")
    with pytest.raises(MinisaError, match="not UTF-8 at byte 3"):
        read_text(path)
    path.write_text("abc")
    with pytest.raises(MinisaError, match="3 tokens give no window of 8: take a longer text"):
        windows(TinyLLM(), path, 8)
    with pytest.raises(MinisaError, match="windows of 129 tokens: expected 2 to 128"):
        windows(TinyLLM(), path, 129)


def test_a_file_s_text_and_sha256(tmp_path: Path) -> None:
    (tmp_path / "t").write_bytes(b"a\r\nb\rc")
    assert read_text(tmp_path / "t") == "a\nb\nc"
    assert sha256_of(tmp_path / "t") == hashlib.sha256(b"a\r\nb\rc").hexdigest()
    for read in (read_text, sha256_of):
        for path in (tmp_path / "none", Path("/dev/zero")):
            with pytest.raises(MinisaError, match=f"{path}: cannot read the"):
                read(path)


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_losses_are_those_of_the_logits(plan: SharingPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    """However windows are batched and positions chunked."""
    monkeypatch.setattr("minisa.study.loss.ROWS", 7)
    model = build_model(SIX_LAYERS, plan)
    tokens = random_tokens(SIX_LAYERS, 3, 24)
    logits = in_one_go(model, tokens)
    chosen = logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    losses = token_losses(model, tokens, batch=2)
    assert torch.allclose(losses, -chosen, atol=1e-4)
    assert perplexity(losses) == pytest.approx((-chosen).mean().exp().item(), rel=1e-4)


def test_a_sample_is_drawn_by_its_seed_and_nothing_twice(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(range(32, 96)))
    (tmp_path / "b").write_bytes(bytes(range(96, 120)))
    paths = [tmp_path / "a", tmp_path / "b"]
    one, other = sample(TinyLLM(), paths, 8, (4,), seed=1)
    assert one.shape == (4, 8) and other.shape == (7, 8)
    assert sorted(torch.cat((one, other)).flatten().tolist()) == list(range(32, 120))
    assert torch.equal(one, sample(TinyLLM(), paths, 8, (4, 7), seed=1)[0])
    assert not torch.equal(one, sample(TinyLLM(), paths, 8, (4, 7), seed=2)[0])
    with pytest.raises(MinisaError, match="11 windows of 8 tokens, 12 are needed"):
        sample(TinyLLM(), paths, 8, (4, 8), seed=1)


def test_every_second_window_says_its_first_half_twice() -> None:
    tokens = torch.arange(21).view(3, 7)
    kept = tokens.clone()
    assert echoing(tokens).tolist() == [[*range(7)], [7, 8, 9, 7, 8, 9, 13], [*range(14, 21)]]
    assert echoing(tokens, 1)[1].tolist() == [7, 8, 9, 10, 8, 9, 10]
    assert torch.equal(tokens, kept)
