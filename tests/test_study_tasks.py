"""The tasks of eval: how the makers' rows become the text that is scored, and what cannot be one."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import example, given

from minisa.errors import MinisaError
from minisa.study.compare import ratio
from minisa.study.tasks import TASKS, read_questions, read_rows, score_numbers
from tests.study_rows import ARC, GSM8K, HELLASWAG, LAMBADA, MMLU, MRPC, PIQA, ROWS, TEXTS, WINOGRANDE, write_rows


class TestTasks:
    @pytest.mark.parametrize("name", ROWS)
    def test_the_text_that_is_scored(self, name: str, tmp_path: Path) -> None:
        (question,) = read_questions(TASKS[name], write_rows(tmp_path / "rows", ROWS[name]), 0, None)
        assert (list(question.prompts), list(question.answers), question.right) == TEXTS[name]

    def test_lambada_s_text_in_one(self, tmp_path: Path) -> None:
        rows = write_rows(tmp_path / "rows", LAMBADA, {"text": f"{LAMBADA['context']} {LAMBADA['continuation']}"})
        apart, together = read_questions(TASKS["lambada"], rows, 0, None)
        assert together == apart

    @given(st.text("[] a\n", min_size=1))
    @example("[" * 200_000)
    def test_hellaswag_s_tags_go_in_linear_time(self, text: str) -> None:
        question = TASKS["hellaswag"].ask(HELLASWAG | {"endings": [text]})
        tagged, bracket, rest = text.strip().rpartition("]")  # in the rest the makers' expression would look forever
        expected = re.sub(r"\[.*?\]", "", tagged + bracket) + rest
        assert question.answers == (" " + expected.replace("  ", " "),)

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
            ("piqa", PIQA | {"label": math.inf}, "row 1: not a row of piqa"),
            ("mmlu", MMLU | {"subject": 5}, "row 1: not a row of mmlu: its subject is no text"),
            ("hellaswag", HELLASWAG | {"endings": ["x"] * 33}, "33 choices, expected at most 32"),
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
