"""eval: the tasks' texts, likelihoods against transformers and one by one, standard errors, and the command line."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from minisa import LLM, cli, console, load
from minisa.errors import MinisaError
from minisa.sharing import SharingPlan
from minisa.study import eval_command, evaluate, progress
from minisa.study.compare import Estimate, paired_difference, ratio
from minisa.study.likelihood import Item, batches, encode, likelihoods
from minisa.study.progress import Progress, duration
from minisa.study.results import Results
from minisa.study.tasks import TASKS, read_questions, read_rows, score_numbers
from minisa.study.variants import Models, parse_variants
from tests.tiny import random_weights, tiny_config, write_gguf, write_hf
from tests.vocabularies import byte_level_json, gguf_byte_level

VOCABULARY = gguf_byte_level(byte_level_json())
CONFIG = tiny_config(
    vocab_size=len(VOCABULARY["tokenizer.ggml.tokens"]), max_seq_len=2048, tie_embeddings=True, n_layers=4
)
WORDS = ["the", "cat", "sat", "on", "a", "mat", "while", "rain", "fell", "over", "quiet", "red", "roof", "in", "town"]

HELLASWAG = {
    "activity_label": "Baking",
    "ctx_a": "[header] How to bake [title] Mix flour. [step] Stir.",
    "ctx_b": "then HE",
    "endings": ["stirs.", "[title] Bake it. [step] Eat  up.", "sleeps."],
    "label": "1",
}
ARC = {"question": "What is hot?", "choices": {"text": ["ice", "fire"], "label": ["A", "B"]}, "answerKey": "B"}
PIQA = {"goal": "Boil an egg.", "sol1": "Use water.", "sol2": "Use sand, a lot of sand.", "label": 0}
MMLU = {"question": " One plus one? ", "subject": "easy_sums", "choices": ["1", "2", "3", "4"], "answer": 1}
SST2 = {"sentence": "a fine film ", "label": 1}
MRPC = {"sentence1": "He ran .", "sentence2": "He was running .", "label": 1}
RTE = {"sentence1": "It rains.", "sentence2": "It is dry.", "label": 1}
WINOGRANDE = {
    "sentence": "The cup missed the bag as the _ was small.",
    "option1": "cup",
    "option2": "bag",
    "answer": "2",
}
LAMBADA = {"context": "He met Ann and said: hello,", "continuation": "Ann"}
GSM8K = {"question": "Two and two?", "answer": "2 + 2 = <<2+2=4>>4\n#### 1,004"}
ROWS = {
    "hellaswag": HELLASWAG, "arc_easy": ARC, "piqa": PIQA, "mmlu": MMLU, "sst2": SST2, "mrpc": MRPC, "rte": RTE,
    "winogrande": WINOGRANDE, "lambada": LAMBADA, "gsm8k": GSM8K,
}  # fmt: skip
TEXTS = {
    "hellaswag": (
        ["Baking: How to bake. Mix flour. Stir. Then he"] * 3,
        [" stirs.", "  Bake it. Eat up.", " sleeps."],
        1,
    ),
    "arc_easy": (["Question: What is hot?\nAnswer:"] * 2, [" ice", " fire"], 1),
    "piqa": (["Question: Boil an egg.\nAnswer:"] * 2, [" Use water.", " Use sand, a lot of sand."], 0),
    "mmlu": (
        [
            "The following are multiple choice questions (with answers) about easy sums.\n\n"
            "One plus one?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:"
        ]
        * 4,
        [" A", " B", " C", " D"],
        1,
    ),
    "sst2": (
        ["a fine film \nQuestion: Is this sentence positive or negative?\nAnswer:"] * 2,
        [" negative", " positive"],
        1,
    ),
    "mrpc": (
        [
            "Sentence 1: He ran .\nSentence 2: He was running .\n"
            "Question: Do both sentences mean the same thing?\nAnswer:"
        ]
        * 2,
        [" no", " yes"],
        1,
    ),
    "rte": (["It rains.\nQuestion: It is dry. True or False?\nAnswer:"] * 2, [" True", " False"], 1),
    "winogrande": (
        ["The cup missed the bag as the cup", "The cup missed the bag as the bag"],
        [" was small.", " was small."],
        1,
    ),
    "lambada": (["He met Ann and said: hello,"], [" Ann"], 0),
    "gsm8k": (["Question: Two and two?\nAnswer:"], [" 2 + 2 = <<2+2=4>>4\n#### 1,004"], 0),
}


def write_rows(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def some_text(n_words: int, seed: int) -> str:
    picks = torch.randint(len(WORDS), (n_words,), generator=torch.Generator().manual_seed(seed))
    return " ".join(WORDS[i] for i in picks)


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A loadable model of four layers whose tokens are bytes and a few merges."""
    path = tmp_path_factory.mktemp("eval") / "tiny.gguf"
    return write_gguf(path, CONFIG, random_weights(CONFIG), metadata=VOCABULARY)


@pytest.fixture(scope="module")
def llm(tiny_gguf: Path) -> LLM:
    return load(tiny_gguf, dtype="fp32", device="cpu", max_seq_len=1, compile=False)


class TestTasks:
    @pytest.mark.parametrize("name", ROWS)
    def test_the_text_that_is_scored(self, name: str, tmp_path: Path) -> None:
        (question,) = read_questions(TASKS[name], write_rows(tmp_path / "rows", ROWS[name]), 0, None)
        assert (list(question.prompts), list(question.answers), question.right) == TEXTS[name]

    def test_every_task_is_here(self) -> None:
        assert set(TASKS) == set(ROWS)

    def test_examples_come_first_with_their_right_answers_and_never_the_question_itself(self, tmp_path: Path) -> None:
        other = ARC | {"question": "What is cold?", "answerKey": "A"}
        data = write_rows(tmp_path / "rows", ARC)
        pool = write_rows(tmp_path / "pool", ARC, other, other)
        (question,) = read_questions(TASKS["arc_easy"], data, 2, pool)
        cold = "Question: What is cold?\nAnswer: ice\n\n"
        assert question.prompts[0] == cold + cold + "Question: What is hot?\nAnswer:"
        with pytest.raises(MinisaError, match="2 examples for --shots 3"):
            read_questions(TASKS["arc_easy"], data, 3, pool)
        with pytest.raises(MinisaError, match="needs --shots-data"):
            read_questions(TASKS["arc_easy"], data, 1, None)

    def test_winogrande_s_example_has_the_right_word(self, tmp_path: Path) -> None:
        other = WINOGRANDE | {"sentence": "Cats like _ best.", "option1": "fish", "option2": "hay", "answer": "1"}
        pool = write_rows(tmp_path / "pool", other)
        (question,) = read_questions(TASKS["winogrande"], write_rows(tmp_path / "rows", WINOGRANDE), 1, pool)
        assert question.prompts[1] == "Cats like fish best.\n\nThe cup missed the bag as the bag"

    def test_mmlu_s_examples_are_of_the_same_subject(self, tmp_path: Path) -> None:
        pool = [MMLU | {"question": f"Q{i}", "subject": ("art", "easy_sums")[i % 2], "answer": 3} for i in range(6)]
        data = write_rows(tmp_path / "rows", MMLU)
        (question,) = read_questions(TASKS["mmlu"], data, 2, write_rows(tmp_path / "pool", *pool))
        heading, first, second, asked = question.prompts[0].split("\n\n")
        assert heading.endswith("about easy sums.")
        assert first == "Q1\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer: D" and second.startswith("Q3\n")
        assert asked.startswith("One plus one?")
        with pytest.raises(MinisaError, match="3 examples of subject 'easy_sums' for --shots 5"):
            read_questions(TASKS["mmlu"], data, 5, tmp_path / "pool")

    def test_limit_takes_the_first(self, tmp_path: Path) -> None:
        data = write_rows(tmp_path / "rows", LAMBADA, LAMBADA | {"continuation": "Bob"}, LAMBADA)
        assert [q.answers[0] for q in read_questions(TASKS["lambada"], data, 0, None, limit=2)] == [" Ann", " Bob"]

    @pytest.mark.parametrize(
        ("task", "row", "message"),
        [
            ("piqa", {"goal": "x"}, "row 1: 'sol1' is missing: expected the fields of piqa"),
            ("piqa", PIQA | {"label": 2}, "its answer is none of its choices"),
            ("winogrande", WINOGRANDE | {"sentence": "no blank"}, "row 1: not a row of winogrande"),
            ("arc_easy", ARC | {"answerKey": "E"}, "row 1: not a row of arc_easy"),
            ("mmlu", MMLU | {"choices": ["1", "2"]}, "row 1: not a row of mmlu"),
            ("gsm8k", GSM8K | {"answer": "four"}, "there is no '#### number'"),
            ("lambada", LAMBADA | {"context": ""}, "a prompt or an answer is empty"),
            ("piqa", [1], "line 1: expected a JSON object"),
        ],
    )
    def test_rows_of_something_else(self, task: str, row: Any, message: str, tmp_path: Path) -> None:
        with pytest.raises(MinisaError, match=message):
            read_questions(TASKS[task], write_rows(tmp_path / "rows", row), 0, None)

    def test_files_that_hold_no_rows(self, tmp_path: Path) -> None:
        (tmp_path / "rows").write_text("{not json\n")
        with pytest.raises(MinisaError, match="line 1: not JSON"):
            read_rows(tmp_path / "rows")
        (tmp_path / "rows").write_text("\n")
        with pytest.raises(MinisaError, match="there are no rows"):
            read_rows(tmp_path / "rows")
        with pytest.raises(MinisaError, match="cannot read"):
            read_rows(tmp_path / "none")

    def test_a_line_separator_inside_a_string_is_not_the_end_of_a_row(self, tmp_path: Path) -> None:
        (tmp_path / "rows").write_text('{"a": "x\u2028y"}\n', encoding="utf-8")
        assert read_rows(tmp_path / "rows") == [{"a": "x\u2028y"}]

    def test_choices_are_scored_whole_and_by_the_character(self, tmp_path: Path) -> None:
        (question,) = read_questions(TASKS["piqa"], write_rows(tmp_path / "rows", PIQA), 0, None)
        score = TASKS["piqa"].score
        assert score is not None  # " Use water." has 10 characters after its space, the other 24
        assert score(question, [-11.0, -12.0], [False, False]) == {"acc_norm": (0, 1), "acc": (1, 1)}
        assert score(question, [-10.0, -25.0], [False, False]) == {"acc_norm": (1, 1), "acc": (1, 1)}

    def test_f1_of_mrpc_is_that_of_the_confusion_matrix(self, tmp_path: Path) -> None:
        labels, chosen = [1, 1, 1, 0, 0, 1], [1, 0, 1, 1, 0, 1]
        data = write_rows(tmp_path / "rows", *(MRPC | {"label": label} for label in labels))
        score = TASKS["mrpc"].score
        assert score is not None
        found = [
            score(question, [-1.0 - choice, -2.0 + choice], [False, False])
            for question, choice in zip(read_questions(TASKS["mrpc"], data, 0, None), chosen, strict=True)
        ]
        precision, recall = 3 / 4, 3 / 4
        assert ratio([s["f1"] for s in found]).value == pytest.approx(2 * precision * recall / (precision + recall))
        assert ratio([s["acc"] for s in found]).value == pytest.approx(4 / 6)

    @pytest.mark.parametrize(
        ("answer", "stated", "last"),
        [
            (" so it is <<4>>\n#### 1004", 1, 1),
            (" #### 1,004.\n\nQ", 1, 1),
            ("#### $1004.00", 1, 1),
            (" The answer is 1004.", 0, 1),
            (" 1004 or 5", 0, 0),
            ("#### 1005", 0, 0),
            ("#### -1004", 0, 0),
            (" I don't know...", 0, 0),
        ],
    )
    def test_generated_numbers(self, answer: str, stated: int, last: int, tmp_path: Path) -> None:
        (question,) = read_questions(TASKS["gsm8k"], write_rows(tmp_path / "rows", GSM8K), 0, None)
        assert score_numbers(question, answer) == {"acc": (stated, 1), "last_number": (last, 1)}


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
    def test_batched_is_one_by_one(self, sa: str | None, tiny_gguf: Path) -> None:
        plan = SharingPlan.following(4, {2: 1, 3: 1}, {2: [3, 0, 0, 1]}) if sa == "head maps" else sa
        llm = load(tiny_gguf, sa=plan, dtype="fp32", device="cpu", max_seq_len=1, compile=False)
        items = items_of(llm)
        assert [item.shared for item in items][1] > 0  # also an only choice
        for found, item in zip(likelihoods(llm.model, items), items, strict=True):
            for likelihood, (total, greedy) in zip(found, one_by_one(llm, item), strict=True):
                assert likelihood.total == pytest.approx(total, abs=1e-4)
                assert likelihood.greedy == greedy

    def test_a_window_is_minded(self, tmp_path: Path) -> None:
        config = tiny_config(vocab_size=CONFIG.vocab_size, tie_embeddings=True, max_seq_len=512, sliding_window=9)
        path = write_gguf(tmp_path / "tiny.gguf", config, random_weights(config), metadata=VOCABULARY)
        llm = load(path, dtype="fp32", device="cpu", max_seq_len=1, compile=False)
        items = items_of(llm)
        for found, item in zip(likelihoods(llm.model, items), items, strict=True):
            for likelihood, (total, _) in zip(found, one_by_one(llm, item), strict=True):
                assert likelihood.total == pytest.approx(total, abs=1e-4)

    def test_greedy_is_what_greedy_decoding_says(self, llm: LLM) -> None:
        prompt = llm.tokenizer.encode("the cat")
        answer = []
        for _ in range(3):
            answer.append(int(llm.logits([*prompt, *answer])[-1].argmax()))
        item = Item.of([encode(llm.tokenizer, "the cat", " sat", 2048)])
        likely = Item.of([type(item.choices[0])((*prompt, *answer), 3)])
        unlikely = Item.of([type(item.choices[0])((*prompt, *answer[:2], (answer[2] + 1) % 256), 3)])
        assert [found[0].greedy for found in likelihoods(llm.model, [likely, unlikely])] == [True, False]

    def test_what_choices_share_is_fed_once(self, llm: LLM) -> None:
        (item,) = items_of(llm)[:1]
        prompt = len(llm.tokenizer.encode(some_text(30, 0)))
        assert item.shared == prompt - 1
        assert item.tokens < sum(len(choice.ids) for choice in item.choices) / 2

    def test_batches_hold_every_item_once_within_the_bound(self, llm: LLM) -> None:
        items = items_of(llm) * 5
        found = list(batches(items, 800))
        assert sorted(i for batch in found for i in batch) == list(range(len(items)))
        assert 1 < len(found) < len(items)
        for batch in found:
            together = [items[i] for i in batch]
            slots = max(i.shared for i in together) + max(i.longest for i in together)
            assert len(batch) == 1 or slots * sum(len(i.choices) for i in together) <= 800
        assert all(len(batch) == 1 for batch in batches(items, 1))

    def test_the_border_between_prompt_and_answer(self, llm: LLM) -> None:
        encoded = encode(llm.tokenizer, "He said: ", "yes", 2048)
        assert llm.tokenizer.decode(encoded.ids[-encoded.answer_tokens :]) == " yes"
        merged = encode(llm.tokenizer, "He said hell", "o", 2048)  # " hello" is a token, " hell" is two
        assert len(merged.ids) < len(llm.tokenizer.encode("He said hell"))
        assert merged.answer_tokens == 1

    def test_a_text_too_long_loses_its_beginning(self, llm: LLM) -> None:
        whole, cut = (encode(llm.tokenizer, some_text(50, 1), " red roof", length) for length in (2048, 40))
        assert cut.ids == whole.ids[-40:] and cut.answer_tokens == whole.answer_tokens
        assert cut.cut and not whole.cut

    def test_item_by_item_against_transformers(self, llm: LLM, tmp_path: Path) -> None:
        """Every task's choices, written out over another implementation: texts, token ids and log-likelihoods."""
        transformers = pytest.importorskip("transformers", reason='needs pip install "minisa[peers]"')
        write_hf(tmp_path, CONFIG, random_weights(CONFIG))
        peer = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path, dtype=torch.float32, attn_implementation="eager"
        )
        checked = 0
        for name, (prompts, answers, _) in TEXTS.items():
            task = TASKS[name]
            if task.score is None:
                continue
            questions = read_questions(task, write_rows(tmp_path / "rows", ROWS[name]), 0, None)
            evaluation = evaluate.Choices.of(llm, task, questions, 4096)
            (record,) = evaluation.run(llm, [0])
            for prompt, answer, found in zip(prompts, answers, record["log_likelihoods"], strict=True):
                start, ids = llm.tokenizer.encode(prompt), llm.tokenizer.encode(prompt + answer)
                with torch.inference_mode():
                    log_p = peer(torch.tensor([ids])).logits[0].log_softmax(-1)
                expected = sum(log_p[t - 1, ids[t]].item() for t in range(len(start), len(ids)))
                assert found == pytest.approx(expected, abs=2e-4)
                checked += 1
        assert checked == 20


class TestStandardErrors:
    def test_of_an_accuracy(self) -> None:
        hits = [1.0, 0.0, 0.0, 1.0, 1.0]
        found = ratio([(hit, 1.0) for hit in hits])
        assert found.value == 0.6
        assert found.stderr == pytest.approx(math.sqrt(sum((h - 0.6) ** 2 for h in hits) / 4 / 5))

    def test_of_a_ratio_is_the_jackknife_s(self) -> None:
        draws = torch.rand(400, 2, generator=torch.Generator().manual_seed(0)).tolist()
        pairs = [(a * (1 + b), 1 + b) for a, b in draws]
        left_out = [ratio(pairs[:i] + pairs[i + 1 :]).value for i in range(400)]
        mean = sum(left_out) / 400
        jackknife = math.sqrt(399 / 400 * sum((value - mean) ** 2 for value in left_out))
        assert ratio(pairs).stderr == pytest.approx(jackknife, rel=0.01)

    def test_pairing_cancels_what_items_have_in_common(self) -> None:
        draws = torch.randn(200, 2, generator=torch.Generator().manual_seed(1)).tolist()
        reference = [(10 * hard, 1.0) for hard, _ in draws]
        mine = [(10 * hard + 0.5 + 0.1 * noise, 1.0) for hard, noise in draws]
        found = paired_difference(mine, reference)
        assert found.value == pytest.approx(0.5, abs=0.03)
        assert found.stderr == pytest.approx(0.1 / math.sqrt(200), rel=0.2)
        assert found.stderr < ratio(mine).stderr / 50

    def test_exp_is_a_perplexity(self) -> None:
        found = Estimate(3.0, 0.01).exp()
        assert found.value == pytest.approx(math.e**3)
        assert found.stderr == pytest.approx((math.exp(3.01) - math.exp(2.99)) / 2, rel=1e-3)

    def test_a_single_item_has_none(self) -> None:
        assert math.isnan(ratio([(1.0, 1.0)]).stderr)
        assert math.isnan(ratio([(0.0, 0.0), (0.0, 0.0)]).value)


class TestResults:
    SETTINGS = {"task": "piqa", "shots": 0}  # noqa: RUF012

    def filled(self, path: Path) -> None:
        results = Results(path, self.SETTINGS)
        results.variant("plain", "a")
        results.add("plain", 3, {"scores": {"acc": [1.0, 1.0]}})
        results.add("plain", 5, {"scores": {"acc": [0.0, 1.0]}})
        results.close()

    def test_are_found_again(self, tmp_path: Path) -> None:
        self.filled(tmp_path / "r.jsonl")
        results = Results(tmp_path / "r.jsonl", self.SETTINGS)
        assert results.variant("plain", "a") == {
            3: {"scores": {"acc": [1.0, 1.0]}},
            5: {"scores": {"acc": [0.0, 1.0]}},
        }
        assert results.variant("1:2", "b") == {}

    def test_a_line_cut_short_is_left_out(self, tmp_path: Path) -> None:
        path = tmp_path / "r.jsonl"
        self.filled(path)
        path.write_text(path.read_text()[:-9])
        results = Results(path, self.SETTINGS)
        assert set(results.variant("plain", "a")) == {3}
        results.add("plain", 5, {"scores": {}})
        results.close()
        assert set(Results(path, self.SETTINGS).variant("plain", "a")) == {3, 5}

    def test_other_settings_are_refused_by_name(self, tmp_path: Path) -> None:
        self.filled(tmp_path / "r.jsonl")
        with pytest.raises(MinisaError, match=r"r.jsonl was made with shots 0, now it is 5: delete the file or"):
            Results(tmp_path / "r.jsonl", self.SETTINGS | {"shots": 5})

    def test_a_plan_that_has_changed_is_refused_by_name(self, tmp_path: Path) -> None:
        self.filled(tmp_path / "r.jsonl")
        with pytest.raises(MinisaError, match="plain has changed since"):
            Results(tmp_path / "r.jsonl", self.SETTINGS).variant("plain", "b")

    @pytest.mark.parametrize("content", ["[1]\n", "{}\n", "no\n", b"\xff\n"])
    def test_another_file_is_refused(self, content: str | bytes, tmp_path: Path) -> None:
        path = tmp_path / "r.jsonl"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(MinisaError, match="line 1: not results of eval"):
            Results(path, self.SETTINGS)

    def test_a_folder_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(MinisaError, match="cannot keep results there: No such file"):
            Results(tmp_path / "none" / "r.jsonl", self.SETTINGS)


class TestProgress:
    def test_lines_with_the_time_left(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        now = [0.0]
        monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
        bar = Progress("plain", 100)
        now[0] = 10.0
        bar.update(10)
        assert capsys.readouterr().err == ""  # not thirty seconds yet
        now[0] = 40.0
        bar.update(25)
        assert capsys.readouterr().err == "plain: 25%, 120 s left\n".replace("120 s", "2 min")

    def test_durations(self) -> None:
        assert [duration(s) for s in (1.4, 99, 150, 7200)] == ["1 s", "99 s", "2 min", "2.0 h"]


class Ran(NamedTuple):
    status: int
    out: str
    err: str


Run = Callable[..., Ran]


@pytest.fixture
def run_eval(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tiny_gguf: Path) -> Run:
    """run_eval(*flags): `python -m minisa eval` on the tiny model, in this process."""

    def run(*flags: object) -> Ran:
        arguments = ["minisa", "eval", "--model", tiny_gguf, "--device", "cpu", *flags]
        monkeypatch.setattr(sys, "argv", list(map(str, arguments)))
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit_:
            console.run(cli.main)
        sys.stdout.flush()
        out, err = capfd.readouterr()
        return Ran(exit_.value.code, out, err)  # type: ignore[arg-type]

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
        self, run_eval: Run, text: Path, llm: LLM, tmp_path: Path
    ) -> None:
        flags = ("--task", "perplexity", "--data", text, "--length", 50, "--limit", 3, "--json", tmp_path / "r.json")
        assert run_eval(*flags).status == 0
        found = json.loads((tmp_path / "r.json").read_text())
        ids = llm.tokenizer.encode(text.read_text())
        losses = []
        for start in (0, 50, 100):
            log_p = llm.logits(ids[start : start + 50]).log_softmax(-1)
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
        self, sa: list[str], run_eval: Run, tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
        models = Models(lambda plan: load(tiny_gguf, plan, "cpu", "fp32", max_seq_len=1, compile=False))
        plans, rivals = (sa[1::2] if sa[:1] == [flag] else [] for flag in ("--sa", "--rival"))
        for variant in parse_variants(plans, rivals, CONFIG, None):
            with models.opened(variant) as llm:
                for item, question in enumerate(questions):
                    ids = llm.tokenizer.encode(question.prompts[0])
                    start = len(ids)
                    while len(ids) < start + 6 and not (len(ids) > start and ids[-1] in llm.tokenizer.eos_ids):
                        ids.append(int(llm.logits(ids)[-1].argmax()))
                    assert answers[variant.name, item] == llm.tokenizer.decode(ids[start:], mid_text=True)
        variants = json.loads((tmp_path / "r.json").read_text())["variants"]
        assert [list(row["metrics"]) for row in variants] == [["acc", "last_number"]] * (1 + bool(sa))

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

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (("--task", "chess"), "'chess' is not one of"),
            (("--task", "perplexity", "--shots", 2), "perplexity has no examples"),
            (("--task", "piqa", "--length", 64), "--length: for perplexity only"),
            (("--task", "piqa", "--shots", 1), "needs --shots-data"),
            (("--task", "gsm8k"), "'answer' is missing"),
            (("--task", "piqa", "--limit", 0), "0 is not in the range x>=1"),
            (("--task", "piqa", "--sa", "9"), "layer 9 is outside the model"),
            (("--task", "piqa", "--sa", "2", "--sa", "2"), "2 is there twice"),
            (("--task", "piqa", "--rival", "sa:2+drop:1"), "only kv-int8 goes with a plan"),
            (("--task", "piqa", "--json", "no/such/r.json"), "cannot keep results there"),
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


@pytest.mark.real_model
def test_the_default_model_prefers_what_is_true(smollm2: LLM) -> None:
    prompt = "Question: What is the capital of France?\nAnswer:"
    item = Item.of([encode(smollm2.tokenizer, prompt, answer, 1024) for answer in (" Paris", " Berlin", " a potato")])
    (found,) = likelihoods(smollm2.model, [item])
    assert max(found, key=lambda likelihood: likelihood.total) == found[0]
