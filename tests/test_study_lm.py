"""lm-eval's interface to a model: against transformers, and answer by answer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from minisa import LLM, load
from minisa.errors import MinisaError
from minisa.sharing import SharingPlan
from minisa.study.loss import score
from tests.loadable import N_TOKENS, VOCABULARY, loadable_gguf
from tests.study_models import STUDY_CONFIG
from tests.study_rows import ROWS, some_text, write_data
from tests.tiny import random_weights, tiny_config, write_gguf, write_hf

pytest.importorskip("lm_eval", reason='needs pip install "minisa[eval]"')
from lm_eval.api.instance import Instance

from minisa.study.lm import MinisaLM
from minisa.study.tasks import LocalTask, samples_of


def requests(kind: Any, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, given, number) for number, given in enumerate(arguments)]


def log_p(llm: LLM, ids: Sequence[int], scored: int) -> tuple[float, bool]:
    """By the definition: the whole text but its last token in one forward pass."""
    found = llm.logits(ids[:-1]).log_softmax(-1)
    places = range(len(ids) - scored, len(ids))
    return sum(found[t - 1, ids[t]].item() for t in places), all(found[t - 1].argmax() == ids[t] for t in places)


@pytest.mark.parametrize("name", ["hellaswag", "arc_easy", "piqa", "winogrande", "lambada", "mmlu", "rte"])
def test_item_by_item_against_transformers(name: str, study_llm: LLM, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason='needs pip install "minisa[peers]"')
    write_hf(tmp_path / "hf", STUDY_CONFIG, random_weights(STUDY_CONFIG))
    peer = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path / "hf", dtype=torch.float32, attn_implementation="eager"
    )
    task = LocalTask(name, write_data(tmp_path / "data", name, *[ROWS[name]] * 7))
    for sample in samples_of(MinisaLM(study_llm), task, limit=2):
        for (prompt, answer), ((found, greedy),) in zip(sample["arguments"], sample["resps"], strict=True):
            start, ids = study_llm.tokenizer.encode(prompt), study_llm.tokenizer.encode(prompt + answer)
            with torch.inference_mode():
                logits = peer(torch.tensor([ids])).logits[0]
            places = range(len(start), len(ids))
            expected = sum(logits[t - 1].log_softmax(-1)[ids[t]].item() for t in places)
            assert found == pytest.approx(expected, abs=2e-4)
            assert greedy == all(logits[t - 1].argmax() == ids[t] for t in places)


@pytest.mark.parametrize("kind", ["plain", "spans", "head maps", "sliding window"])
def test_choices_together_are_each_by_itself(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minisa.study.loss.ROWS", 7)
    config = STUDY_CONFIG
    if kind == "sliding window":
        config = tiny_config(vocab_size=N_TOKENS, tie_embeddings=True, max_seq_len=512, sliding_window=9)
    sa = {"spans": "1:2-3", "head maps": SharingPlan.following(4, {2: 1, 3: 1}, {2: [3, 0, 0, 1]})}.get(kind)
    path = loadable_gguf(tmp_path / "tiny.gguf", config)
    llm = load(path, sa=sa, dtype="fp32", device="cpu", max_seq_len=1, compile=False)
    for seed, (words, choices) in enumerate([(30, 4), (3, 1), (90, 2), (1, 2)]):
        prompt = llm.tokenizer.encode(some_text(words, seed))
        answers = [llm.tokenizer.encode(" " + some_text(1 + 5 * i, 100 * seed + i)) for i in range(choices)]
        texts = [(prompt + answer, len(answer)) for answer in answers]
        for (found, greedy), text in zip(score(llm.model, texts), texts, strict=True):
            assert (found, greedy) == (pytest.approx(log_p(llm, *text)[0], abs=1e-4), log_p(llm, *text)[1])
    ids = llm.tokenizer.encode("the cat")
    for _ in range(3):
        ids.append(int(llm.logits(ids)[-1].argmax()))
    unlikely = [*ids[:-1], (ids[-1] + 1) % N_TOKENS]
    assert [greedy for _, greedy in score(llm.model, [(ids, 3), (unlikely, 3)])] == [True, False]


def test_a_text_too_long_loses_its_beginning(tmp_path: Path) -> None:
    path = loadable_gguf(tmp_path / "tiny.gguf", tiny_config(vocab_size=N_TOKENS, max_seq_len=40))
    llm = load(path, dtype="fp32", device="cpu", compile=False)
    lm, prompt = MinisaLM(llm), some_text(50, 1)
    ids = llm.tokenizer.encode(prompt + " red roof")
    scored = len(ids) - len(llm.tokenizer.encode(prompt))
    expected, _ = log_p(llm, ids[-41:], scored)
    ((found, _),) = lm.loglikelihood(requests("loglikelihood", (prompt, " red roof")))
    assert found == pytest.approx(expected, abs=1e-4)
    assert lm.truncated == 1
    for answer in ("", prompt):
        with pytest.raises(MinisaError, match="tokens to score: expected 1 to 40"):
            lm.loglikelihood(requests("loglikelihood", ("a", answer)))
    with pytest.raises(MinisaError, match="the context is 40 tokens long: expected more than 256"):
        lm.generate_until(requests("generate_until", ("a", {})))

    whole = [lm.prefix_token_id, *ids]  # each token once, from all that a window holds before it
    expected = log_p(llm, whole[:41], 40)[0]
    for start in range(41, len(whole), 40):
        window = whole[max(min(start + 40, len(whole)) - 41, 0) : start + 40]
        expected += log_p(llm, window, len(whole[start : start + 40]))[0]
    (found,) = lm.loglikelihood_rolling(requests("loglikelihood_rolling", (prompt + " red roof",)))
    assert found == pytest.approx(expected, abs=1e-3)


def test_answers_are_greedy_text_up_to_a_stop_string(study_gguf: Path) -> None:
    llm = load(study_gguf, dtype="fp32", device="cpu", max_seq_len=64, max_batch=2, compile=False)
    prompts = [some_text(2 + i, i) for i in range(3)]
    answers = []
    for prompt in prompts:
        ids = llm.tokenizer.encode(prompt)
        start = len(ids)
        while len(ids) < start + 6 and ids[-1] not in llm.tokenizer.eos_ids:
            ids.append(int(llm.logits(ids)[-1].argmax()))
        answers.append(llm.tokenizer.decode(ids[start:], mid_text=True))
    asked = [(prompt, {"max_gen_toks": 6, "until": []}) for prompt in prompts]
    stop = answers[0][1:3]
    asked.append((prompts[0], {"max_gen_toks": 6, "until": [stop], "do_sample": False, "temperature": 0.0}))
    assert MinisaLM(llm).generate_until(requests("generate_until", *asked)) == [*answers, answers[0].split(stop)[0]]


def test_logits_that_overflow_are_an_error(tmp_path: Path) -> None:
    """They would make the first choice the right one."""
    weights = random_weights(STUDY_CONFIG)
    weights["norm.weight"] *= 1e4
    path = write_gguf(tmp_path / "large.gguf", STUDY_CONFIG, weights, metadata=VOCABULARY)
    llm = load(path, dtype="fp16", device="cpu", max_seq_len=1, compile=False)
    with pytest.raises(MinisaError, match="predictions are no numbers"):
        MinisaLM(llm).loglikelihood(requests("loglikelihood", ("a", " b")))
