"""Likelihoods: against transformers, and one choice by one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from minisa import LLM, load
from minisa.errors import MinisaError
from minisa.sharing import SharingPlan
from minisa.study import evaluate
from minisa.study.likelihood import Item, batches, encode, likelihoods
from minisa.study.tasks import TASKS, read_questions
from tests.loadable import N_TOKENS, loadable_gguf
from tests.study_models import STUDY_CONFIG
from tests.study_rows import ROWS, TEXTS, some_text, write_rows
from tests.tiny import random_weights, tiny_config, write_hf


def items_of(llm: LLM) -> list[Item]:
    """Items of unlike lengths and kinds: one, two and four choices, prompts that differ, answers of many tokens."""
    items = []
    for seed, (words, choices) in enumerate([(30, 4), (3, 1), (90, 2), (12, 4), (1, 2)]):
        prompt = some_text(words, seed)
        answers = [" " + some_text(1 + 3 * i, 100 * seed + i) for i in range(choices)]
        items.append(Item.of([encode(llm.tokenizer, prompt, answer, 2048) for answer in answers]))
    start = some_text(20, 50)
    items.append(Item.of([encode(llm.tokenizer, f"{start} {word}", " was red.", 2048) for word in ("mat", "a town")]))
    return items


def one_by_one(llm: LLM, item: Item) -> list[tuple[float, bool]]:
    """By the definition: the whole text in one forward pass, log p of the answer's tokens summed."""
    found = []
    for choice in item.choices:
        log_p = llm.logits(choice.ids).log_softmax(-1)
        places = range(len(choice.ids) - choice.answer_tokens, len(choice.ids))
        total = sum(log_p[t - 1, choice.ids[t]].item() for t in places)
        found.append((total, all(log_p[t - 1].argmax() == choice.ids[t] for t in places)))
    return found


class TestLikelihoods:
    @pytest.mark.parametrize("sa", [None, "1:2-3", "head maps"])
    def test_batched_is_one_by_one(self, sa: str | None, study_gguf: Path) -> None:
        plan = SharingPlan.following(4, {2: 1, 3: 1}, {2: [3, 0, 0, 1]}) if sa == "head maps" else sa
        study_llm = load(study_gguf, sa=plan, dtype="fp32", device="cpu", max_seq_len=1, compile=False)
        items = items_of(study_llm)
        assert [item.shared for item in items][1] > 0  # also an only choice
        for found, item in zip(likelihoods(study_llm.model, items), items, strict=True):
            for likelihood, (total, greedy) in zip(found, one_by_one(study_llm, item), strict=True):
                assert likelihood.total == pytest.approx(total, abs=1e-4)
                assert likelihood.greedy == greedy

    def test_a_window_is_minded(self, tmp_path: Path) -> None:
        config = tiny_config(vocab_size=N_TOKENS, tie_embeddings=True, max_seq_len=512, sliding_window=9)
        path = loadable_gguf(tmp_path / "tiny.gguf", config)
        study_llm = load(path, dtype="fp32", device="cpu", max_seq_len=1, compile=False)
        items = items_of(study_llm)
        for found, item in zip(likelihoods(study_llm.model, items), items, strict=True):
            for likelihood, (total, _) in zip(found, one_by_one(study_llm, item), strict=True):
                assert likelihood.total == pytest.approx(total, abs=1e-4)

    def test_greedy_is_what_greedy_decoding_says(self, study_llm: LLM) -> None:
        prompt = study_llm.tokenizer.encode("the cat")
        answer = []
        for _ in range(3):
            answer.append(int(study_llm.logits([*prompt, *answer])[-1].argmax()))
        item = Item.of([encode(study_llm.tokenizer, "the cat", " sat", 2048)])
        likely = Item.of([type(item.choices[0])((*prompt, *answer), 3)])
        unlikely = Item.of([type(item.choices[0])((*prompt, *answer[:2], (answer[2] + 1) % 256), 3)])
        assert [found[0].greedy for found in likelihoods(study_llm.model, [likely, unlikely])] == [True, False]

    def test_what_choices_share_is_fed_once(self, study_llm: LLM) -> None:
        (item,) = items_of(study_llm)[:1]
        prompt = len(study_llm.tokenizer.encode(some_text(30, 0)))
        assert item.shared == prompt - 1
        assert item.tokens < sum(len(choice.ids) for choice in item.choices) / 2

    def test_batches_hold_every_item_once_within_the_bound(self, study_llm: LLM) -> None:
        items = items_of(study_llm) * 5
        found = list(batches(items, 800))
        assert sorted(i for batch in found for i in batch) == list(range(len(items)))
        assert 1 < len(found) < len(items)
        for batch in found:
            together = [items[i] for i in batch]
            slots = max(i.shared for i in together) + max(i.longest for i in together)
            assert len(batch) == 1 or slots * sum(len(i.choices) for i in together) <= 800
        assert all(len(batch) == 1 for batch in batches(items, 1))

    def test_the_border_between_prompt_and_answer(self, study_llm: LLM) -> None:
        encoded = encode(study_llm.tokenizer, "He said: ", "yes", 2048)
        assert study_llm.tokenizer.decode(encoded.ids[-encoded.answer_tokens :]) == " yes"
        merged = encode(study_llm.tokenizer, "He said hell", "o", 2048)  # " hello" is a token, " hell" is two
        assert len(merged.ids) < len(study_llm.tokenizer.encode("He said hell"))
        assert merged.answer_tokens == 1

    def test_a_text_too_long_loses_its_beginning(self, study_llm: LLM) -> None:
        whole, cut = (encode(study_llm.tokenizer, some_text(50, 1), " red roof", length) for length in (2048, 40))
        assert cut.ids == whole.ids[-40:] and cut.answer_tokens == whole.answer_tokens
        assert cut.cut and not whole.cut

    @pytest.mark.parametrize(("answer", "length"), [("", 2048), (" red roof", 1)])
    def test_an_answer_without_a_token_is_refused(self, answer: str, length: int, study_llm: LLM) -> None:
        with pytest.raises(MinisaError, match=f"after 'a': .* tokens, of which the model takes {length}: expected two"):
            encode(study_llm.tokenizer, "a", answer, length)

    def test_item_by_item_against_transformers(self, study_llm: LLM, tmp_path: Path) -> None:
        """Every task's choices, written out over another implementation: texts, token ids and log-likelihoods."""
        transformers = pytest.importorskip("transformers", reason='needs pip install "minisa[peers]"')
        write_hf(tmp_path, STUDY_CONFIG, random_weights(STUDY_CONFIG))
        peer = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path, dtype=torch.float32, attn_implementation="eager"
        )
        checked = 0
        for name, (prompts, answers, _) in TEXTS.items():
            task = TASKS[name]
            if task.score is None:
                continue
            questions = read_questions(task, write_rows(tmp_path / "rows", ROWS[name]), 0, None)
            evaluation = evaluate.Choices.of(study_llm, task, questions, 4096)
            (record,) = evaluation.run(study_llm, [0])
            for prompt, answer, found in zip(prompts, answers, record["log_likelihoods"], strict=True):
                start, ids = study_llm.tokenizer.encode(prompt), study_llm.tokenizer.encode(prompt + answer)
                with torch.inference_mode():
                    log_p = peer(torch.tensor([ids])).logits[0].log_softmax(-1)
                expected = sum(log_p[t - 1, ids[t]].item() for t in range(len(start), len(ids)))
                assert found == pytest.approx(expected, abs=2e-4)
                checked += 1
        assert checked == 20


@pytest.mark.real_model
def test_the_default_model_prefers_what_is_true(smollm2: LLM) -> None:
    prompt = "Question: What is the capital of France?\nAnswer:"
    item = Item.of([encode(smollm2.tokenizer, prompt, answer, 1024) for answer in (" Paris", " Berlin", " a potato")])
    (found,) = likelihoods(smollm2.model, [item])
    assert max(found, key=lambda likelihood: likelihood.total) == found[0]
