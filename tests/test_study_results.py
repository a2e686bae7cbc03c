"""What eval makes of its records: standard errors, results that are kept, progress."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from minisa.errors import MinisaError
from minisa.study import progress
from minisa.study.compare import Estimate, paired_difference, ratio
from minisa.study.progress import Progress, duration
from minisa.study.results import Results


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

    def test_a_loss_beyond_floats_is_an_infinite_perplexity(self) -> None:
        assert Estimate(1000.0, 0.01).exp() == Estimate(math.inf, math.inf)

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

    @pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a disk that is full")
    def test_a_full_disk_is_said_with_the_file_s_name(self, tmp_path: Path) -> None:
        path = tmp_path / "r.jsonl"
        self.filled(path)
        results = Results(path, self.SETTINGS)
        results.variant("plain", "a")
        results._file = open("/dev/full", "a")  # noqa: SIM115 (closed with the results)
        with pytest.raises(MinisaError, match=r"r.jsonl: cannot keep results there: No space left on device"):
            results.add("plain", 7, {"scores": {}})
        results.close()
        assert results._file.closed
        assert set(Results(path, self.SETTINGS).variant("plain", "a")) == {3, 5}

    def test_one_run_at_a_time_has_the_file(self, tmp_path: Path) -> None:
        """Lines of two would make a file that neither goes on from."""
        path = tmp_path / "r.jsonl"
        first = Results(path, self.SETTINGS)
        with pytest.raises(MinisaError, match=r"r.jsonl: another eval is at work on it: wait, or take another --json"):
            Results(path, self.SETTINGS)
        first.close()
        self.filled(path)

    def test_other_settings_are_refused_by_name(self, tmp_path: Path) -> None:
        self.filled(tmp_path / "r.jsonl")
        with pytest.raises(MinisaError, match=r"r.jsonl was made with shots 0, now it is 5: delete the file or"):
            Results(tmp_path / "r.jsonl", self.SETTINGS | {"shots": 5})

    def test_a_plan_that_has_changed_is_refused_by_name(self, tmp_path: Path) -> None:
        self.filled(tmp_path / "r.jsonl")
        with pytest.raises(MinisaError, match="plain has changed since"):
            Results(tmp_path / "r.jsonl", self.SETTINGS).variant("plain", "b")

    @pytest.mark.parametrize("content", [b"[1]\n", b"{}\n", b"no\n", b"no", b"\xff\n"])
    def test_another_file_is_refused_and_left_as_it_is(self, content: bytes, tmp_path: Path) -> None:
        path = tmp_path / "r.jsonl"
        path.write_bytes(content)
        with pytest.raises(MinisaError, match="line 1: not results of eval"):
            Results(path, self.SETTINGS)
        assert path.read_bytes() == content

    @pytest.mark.parametrize(
        "changes",
        [
            *({"item": item} for item in ("3", -1, 1.0, True, None)),
            *({"scores": scores} for scores in (None, [], {}, {"f1": [1.0, 1.0]})),
            *({"scores": {"acc": pair}} for pair in (1.0, [1.0], [1.0, 1.0, 1.0], ["1", 1.0], [math.inf, 1.0])),
            *({"scores": {"acc": pair}} for pair in ([10**400, 1], [1e300, 1.0], [True, 1.0], [None, 1.0])),
        ],
        ids=str,
    )
    def test_a_record_that_no_evaluation_leaves(self, changes: dict[str, Any], tmp_path: Path) -> None:
        path = tmp_path / "r.jsonl"
        self.filled(path)
        record = {"variant": "plain", "item": 7, "scores": {"acc": [math.nan, 1.0]}}
        with path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        assert 7 in Results(path, self.SETTINGS, ("acc",)).variant("plain", "a")
        with path.open("a") as file:
            file.write(json.dumps(record | changes) + "\n")
        with pytest.raises(MinisaError, match="line 6: not results of eval: delete the file"):
            Results(path, self.SETTINGS, ("acc",))

    def test_a_pipe_is_not_waited_for(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "r.jsonl")
        with pytest.raises(MinisaError, match="cannot keep results there: not a file"):
            Results(tmp_path / "r.jsonl", self.SETTINGS)

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
