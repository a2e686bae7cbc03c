"""Files over HTTPS: resumed, verified, and never half there, whatever the server does."""

from __future__ import annotations

import json
import re
import socket
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from minisa.errors import MinisaError
from minisa.models import https
from minisa.models.download import pull
from minisa.models.registry import ModelFile, find, local_path
from tests.publisher import BIG, Publisher, contents, failure, isolate, model, sha256


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    isolate(monkeypatch, tmp_path)


# ---- all goes well ----


def test_a_sharded_model_arrives_whole_and_only_once(publisher: Publisher, tmp_path: Path) -> None:
    shards = {"model-00001-of-00002.safetensors": BIG, "model-00002-of-00002.safetensors": b"tail"}
    index = json.dumps({"weight_map": dict(zip("abc", [*shards, "model-00001-of-00002.safetensors"], strict=True))})
    publisher.files = {"config.json": b"{}", "model.safetensors.index.json": index.encode(), **shards, "other": b""}
    entry = model(publisher, "config.json", "model.safetensors.index.json")
    seen: list[tuple[str, int, int | None]] = []
    assert pull(entry, progress=lambda *step: seen.append(step)) == tmp_path / "tiny" == local_path(entry)
    assert contents(tmp_path / "tiny") == {name: publisher.files[name] for name in publisher.files if name != "other"}
    big = [done for name, done, _ in seen if name == "model-00001-of-00002.safetensors"]
    assert big == sorted(big) and (big[0], big[-1]) == (0, len(BIG)) and len(big) > 10
    assert {total for name, _, total in seen if name == "model-00001-of-00002.safetensors"} == {len(BIG)}
    publisher.asked.clear()
    assert pull(entry) == tmp_path / "tiny"
    assert publisher.asked == []


def test_only_what_lacks_is_fetched(publisher: Publisher, tmp_path: Path) -> None:
    publisher.files = {"config.json": b"{}", "model.safetensors": BIG}
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").write_bytes(b"mine")
    (tmp_path / "tiny" / "model.safetensors").write_bytes(b"half")  # models.toml knows better
    pull(model(publisher, "config.json", ModelFile("model.safetensors", sha256(BIG), len(BIG))))
    assert contents(tmp_path / "tiny") == {"config.json": b"mine", "model.safetensors": BIG}


def test_the_token_goes_to_the_publisher_and_not_to_its_storage(
    publisher: Publisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """urllib's own redirects would carry the Authorization header to any host."""
    publisher.files, publisher.token = {"model.gguf": BIG}, "hf_secret"
    monkeypatch.setenv("HF_TOKEN", " hf_secret\n")
    assert pull(model(publisher, "model.gguf")).read_bytes() == BIG
    assert {(path.split("/")[1], token) for _, path, _, token in publisher.asked} == {
        ("repo", "Bearer hf_secret"),
        ("store", None),
    }


# ---- interrupted, cut off, changed ----


def test_ctrl_c_keeps_the_part_and_the_next_pull_goes_on_from_it(publisher: Publisher, tmp_path: Path) -> None:
    publisher.files = {"model.gguf": BIG}

    def interrupt(name: str, done: int, total: int | None) -> None:
        if done > len(BIG) // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pull(model(publisher, "model.gguf"), progress=interrupt)
    (part,) = contents(tmp_path / "tiny")
    assert re.fullmatch(r"model\.gguf\.[0-9a-f]{8}\.part", part)
    kept = (tmp_path / "tiny" / part).stat().st_size
    assert len(BIG) // 2 < kept < len(BIG)
    seen: list[int] = []
    pull(model(publisher, "model.gguf"), progress=lambda name, done, total: seen.append(done))
    assert contents(tmp_path / "tiny") == {"model.gguf": BIG}
    assert publisher.gets("model.gguf") == [None, f"bytes={kept}-"]
    assert seen[0] == kept


@pytest.mark.parametrize("states_sha256", [True, False])
def test_a_connection_that_breaks_is_taken_up_where_it_broke(publisher: Publisher, states_sha256: bool) -> None:
    publisher.files, publisher.states_sha256 = {"model.gguf": BIG}, states_sha256
    publisher.cut = [100_000, 0, 200_000]
    assert pull(model(publisher, "model.gguf")).read_bytes() == BIG
    assert publisher.gets("model.gguf") == [None, "bytes=100000-", "bytes=100000-", "bytes=300000-"]


def test_attempts_that_bring_something_are_not_counted(publisher: Publisher) -> None:
    publisher.files, publisher.cut = {"model.gguf": BIG}, [100_000] * (2 * https.RETRIES)
    assert pull(model(publisher, "model.gguf")).read_bytes() == BIG


def test_a_silent_connection_is_given_up_and_taken_up_again(
    publisher: Publisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    publisher.files, publisher.stall = {"model.gguf": BIG}, [1 << 20]
    monkeypatch.setattr(https, "TIMEOUT", 0.3)
    assert pull(model(publisher, "model.gguf")).read_bytes() == BIG
    assert publisher.gets("model.gguf") == [None, f"bytes={1 << 20}-"]


def test_a_slow_download_shows_progress_and_is_not_given_up(
    publisher: Publisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    publisher.files, publisher.pause = {"model.gguf": BIG[: 1 << 20]}, 0.02
    monkeypatch.setattr(https, "TIMEOUT", 0.2)  # for the whole it would be too little
    seen: list[int] = []
    pull(model(publisher, "model.gguf"), progress=lambda name, done, total: seen.append(done))
    assert publisher.gets("model.gguf") == [None]
    assert len(seen) >= 4


def test_a_download_that_never_ends_is_given_up_but_kept(publisher: Publisher, tmp_path: Path) -> None:
    publisher.files, publisher.cut = {"model.gguf": BIG}, [1000] + [0] * 20
    message = failure(model(publisher, "model.gguf"))
    assert f"the connection closed after 1000 of {len(BIG)} bytes" in message
    assert "run this again to go on" in message
    assert list(contents(tmp_path / "tiny").values()) == [BIG[:1000]]


def test_a_server_without_ranges_that_cuts_off_does_not_loop_forever(publisher: Publisher) -> None:
    publisher.files, publisher.ranges, publisher.cut = {"model.gguf": BIG}, False, [1000] * 50
    assert "gave up after 5 attempts. What has arrived is kept: run this again" in failure(
        model(publisher, "model.gguf")
    )


@pytest.mark.parametrize("states_sha256", [True, False])
def test_a_file_that_changed_is_not_glued_to_the_old_half(
    publisher: Publisher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, states_sha256: bool
) -> None:
    publisher.files, publisher.states_sha256 = {"model.gguf": BIG}, states_sha256
    publisher.cut = [1 << 20]
    monkeypatch.setattr(https, "RETRIES", 0)
    failure(model(publisher, "model.gguf"))
    publisher.files = {"model.gguf": BIG[::-1]}
    assert pull(model(publisher, "model.gguf")).read_bytes() == BIG[::-1]
    assert contents(tmp_path / "tiny").keys() == {"model.gguf"}  # the old half is gone


def test_a_file_that_changes_between_asking_and_getting_starts_over(
    publisher: Publisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a sha256 only If-Range can tell."""
    publisher.files, publisher.states_sha256, publisher.cut = {"model.gguf": BIG}, False, [1 << 20]
    monkeypatch.setattr(https, "RETRIES", 0)
    failure(model(publisher, "model.gguf"))
    request, reversed_ = https._request, BIG[::-1]

    def change_before_get(url: str, method: str, headers: dict[str, str] | None = None) -> Any:
        if method == "GET":
            publisher.files = {"model.gguf": reversed_}
        return request(url, method, headers)

    monkeypatch.setattr(https, "_request", change_before_get)
    assert pull(model(publisher, "model.gguf")).read_bytes() == reversed_


@pytest.mark.parametrize("vouches", ["etag", "weak_etag"])
def test_what_nobody_vouches_to_be_the_same_is_not_resumed(publisher: Publisher, vouches: str) -> None:
    """A weak ETag promises the same meaning, not the same bytes."""
    publisher.files, publisher.states_sha256 = {"model.gguf": BIG}, False
    setattr(publisher, vouches, vouches == "weak_etag")
    publisher.cut = [1 << 20]
    assert pull(model(publisher, "model.gguf")).read_bytes() == BIG
    assert publisher.gets("model.gguf") == [None, None]


def test_a_server_that_knows_no_ranges_sends_all_again(publisher: Publisher) -> None:
    publisher.files, publisher.ranges, publisher.cut = {"model.gguf": BIG}, False, [1 << 20]
    assert pull(model(publisher, "model.gguf")).read_bytes() == BIG
    assert publisher.gets("model.gguf") == [None, f"bytes={1 << 20}-"]


def test_a_range_that_slips_is_not_appended(publisher: Publisher) -> None:
    publisher.files, publisher.range_slips, publisher.cut = {"model.gguf": BIG}, True, [1 << 20]
    publisher.states_sha256 = False  # so that nothing but the Content-Range tells
    assert pull(model(publisher, "model.gguf")).read_bytes() == BIG
    assert publisher.gets("model.gguf") == [None, f"bytes={1 << 20}-", None]


def test_a_part_that_is_already_whole_is_not_asked_for(publisher: Publisher, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process killed while it verified the file leaves a .part of full length; a Range beyond it answers 416."""
    publisher.files = {"model.gguf": BIG}

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as killed:
        killed.setattr(https, "put_in_place", die)
        with pytest.raises(KeyboardInterrupt):
            pull(model(publisher, "model.gguf"))
    assert pull(model(publisher, "model.gguf")).read_bytes() == BIG
    assert publisher.gets("model.gguf") == [None]


# ---- what the server says and is not let do ----


@pytest.mark.parametrize("status", [429, 500, 503, 403])
def test_a_passing_failure_is_tried_again(publisher: Publisher, status: int) -> None:
    """403 comes from the storage here: the address it was signed for has run out."""
    publisher.files, publisher.statuses = {"model.gguf": BIG}, [status, status]
    assert pull(model(publisher, "model.gguf")).read_bytes() == BIG
    publisher.files["other.gguf"], publisher.statuses = BIG, [status] * 9
    message = failure(model(publisher, "other.gguf"))
    assert f"the server answers {status}; gave up after 5 attempts" in message


def test_a_gated_model_says_how_to_get_access(publisher: Publisher, monkeypatch: pytest.MonkeyPatch) -> None:
    publisher.files, publisher.token = {"config.json": b"{}"}, "hf_right"
    entry = model(publisher, "config.json", gated=True)
    message = failure(entry)
    assert "tiny is gated (401): accept its licence at https://example.org/tiny" in message
    assert "HF_TOKEN=… python -m minisa pull tiny" in message
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    message = failure(entry)
    assert "HF_TOKEN is not let in (403)" in message and "hf_wrong" not in message
    monkeypatch.setenv("HF_TOKEN", "hf_right\r\nX-Evil: 1")
    assert "HF_TOKEN has characters that no access token has" in failure(entry)
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    assert pull(entry).is_dir()


def test_a_file_that_is_not_there_is_said_at_once(publisher: Publisher) -> None:
    message = failure(model(publisher, "config.json"))
    assert f"{publisher.url}config.json: not found (404)" in message and "models.toml" in message
    assert len(publisher.asked) == 1


@pytest.mark.parametrize("target", ["http://weights.example.org/x", "file:///etc/passwd", "ftp://example.org/x"])
def test_redirects_lead_to_https_only(publisher: Publisher, target: str) -> None:
    publisher.files, publisher.redirect = {"model.gguf": BIG}, target
    assert f"{target}: refused: weights are fetched over https only" in failure(model(publisher, "model.gguf"))


def test_no_redirect_leads_from_a_publisher_to_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = SimpleNamespace(status=302, headers={"Location": "http://127.0.0.1:1/x"}, close=lambda: None)
    monkeypatch.setattr(https, "_open", lambda *_: elsewhere)
    with pytest.raises(MinisaError, match=r"http://127\.0\.0\.1:1/x: refused: weights are fetched over https only"):
        https.fetch("https://weights.example.org/x", Path("x"), lambda *_: None)


@pytest.mark.parametrize(
    "target",
    ["http://[bad", "/é", f"https://{'a' * 70}.example.org/x", "http://127.0.0.1:x/", f"https://localhost:{10**30}/"],
)
def test_a_redirect_to_no_address_is_said(publisher: Publisher, target: str) -> None:
    publisher.files, publisher.redirect = {"model.gguf": BIG}, target
    message = failure(model(publisher, "model.gguf"))
    assert f"{publisher.url}model.gguf: " in message
    assert "redirects to what is no address" in message or "gave up" in message


def test_a_size_of_thousands_of_digits_is_none(publisher: Publisher) -> None:
    publisher.files, publisher.size_digits = {"model.gguf": BIG}, "9" * 5000
    for publisher.states_sha256 in (True, False):
        assert "the server states a size of 999" in failure(model(publisher, "model.gguf"))


def test_endless_redirects_end(publisher: Publisher) -> None:
    publisher.files, publisher.redirect = {"model.gguf": BIG}, "/repo/model.gguf"
    assert "more than 10 redirects" in failure(model(publisher, "model.gguf"))


def test_wrong_bytes_are_removed_and_said(publisher: Publisher, tmp_path: Path) -> None:
    publisher.files, publisher.states_sha256 = {"model.gguf": BIG}, False
    message = failure(model(publisher, ModelFile("model.gguf", "0" * 64)))
    assert f"model.gguf: its sha256 is {sha256(BIG)}, expected {'0' * 64}" in message
    assert contents(tmp_path / "tiny") == {}


def test_bytes_that_are_not_what_the_server_stated_are_removed(publisher: Publisher, tmp_path: Path) -> None:
    publisher.files, publisher.wrong_sha256 = {"model.gguf": BIG}, sha256(b"something else")
    message = failure(model(publisher, "model.gguf"))
    assert f"its sha256 is {sha256(BIG)}, expected {sha256(b'something else')}" in message
    assert contents(tmp_path / "tiny") == {}


@pytest.mark.parametrize("file", [ModelFile("model.gguf", "0" * 64), ModelFile("model.gguf", None, 7)])
def test_a_server_that_contradicts_models_toml_is_not_listened_to(publisher: Publisher, file: ModelFile) -> None:
    publisher.files = {"model.gguf": BIG}
    message = failure(model(publisher, file))
    assert "models.toml wants" in message and "nothing was fetched" in message
    assert publisher.gets("model.gguf") == []


def test_a_file_nobody_vouches_for_is_not_fetched(publisher: Publisher) -> None:
    publisher.files, publisher.states_sha256, publisher.states_size = {"model.gguf": BIG}, False, False
    assert "states neither size nor sha256" in failure(model(publisher, "model.gguf"))
    assert pull(model(publisher, ModelFile("model.gguf", sha256(BIG)))).read_bytes() == BIG


def test_more_bytes_than_announced_are_not_kept(publisher: Publisher, tmp_path: Path) -> None:
    publisher.files, publisher.extra = {"model.gguf": BIG}, b"and more"
    assert f"sent more than the {len(BIG)} bytes" in failure(model(publisher, "model.gguf"))
    assert all(len(content) <= len(BIG) for content in contents(tmp_path / "tiny").values())


def test_an_index_that_names_files_elsewhere_is_removed(publisher: Publisher, tmp_path: Path) -> None:
    index = b'{"weight_map": {"a": "../../evil.safetensors"}}'
    publisher.files = {"model.safetensors.index.json": index}
    message = failure(model(publisher, "model.safetensors.index.json"))
    assert "evil.safetensors" in message and "it was removed: pull tiny again" in message
    assert contents(tmp_path / "tiny") == {}


def test_being_offline_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    attempts = []

    def no_network(host: str, *_: object, **__: object) -> None:
        attempts.append(host)
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.setenv("no_proxy", "*")
    message = failure(find("tinyllama-1.1b-chat"))
    assert "cannot reach huggingface.co (Name or service not known): are you offline?" in message
    assert attempts == ["huggingface.co"]


def test_a_server_that_is_not_there_is_said(publisher: Publisher) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        publisher.port = unused.getsockname()[1]
        assert "Connection refused; gave up after 5 attempts: run this again" in failure(model(publisher, "model.gguf"))


@pytest.mark.parametrize("size", [b"-1", b"-5"])
def test_a_chunk_of_negative_size(size: bytes, tmp_path: Path) -> None:
    """Python's own reader takes it for all that is still to come, at once, or raises ValueError."""
    chunk = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + size + b"\r\n" + b"x" * 200
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:  # the test is over
                    return
                with connection:
                    asked = connection.recv(1 << 16)
                    head = asked.startswith(b"HEAD")
                    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n" if head else chunk)

        threading.Thread(target=answer, daemon=True).start()
        with pytest.raises(MinisaError, match="sent more than the 100 bytes it announced"):
            https.fetch(f"http://127.0.0.1:{server.getsockname()[1]}/f", tmp_path / "f", lambda *_: None)
