"""Files that are written whole or not at all, and JSON that is read within bounds."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from minisa.checkpoint.safetensors import write_safetensors
from minisa.errors import MinisaError
from minisa.files import parse_json, write_whole, written_whole


def write_tensors(path: Path, _: str) -> None:
    write_safetensors(path, {"a": torch.ones(3)})


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a disk that is full")
@pytest.mark.parametrize("write", [write_whole, write_tensors])
def test_a_full_disk_leaves_what_was_there_and_nothing_else(write, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    file = tmp_path / "file"
    file.write_text("before")
    (tmp_path / f"file.{os.getpid()}.part").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        write(file, "text")
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and file.read_text() == "before"
    write(file, "text")
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and file.read_bytes() != b"before"


def test_what_is_no_file_stays_what_it_is(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(OSError, match="not a file"), written_whole(path):
            pytest.fail("it would be overwritten")
    assert os.listdir(tmp_path) == ["pipe"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"", "x is not valid JSON"),
        (b"\xff", "x is not valid JSON"),
        (b"9" * 10_000, "x is not valid JSON"),
        (b"[" * 100_000, "x is not valid JSON .*: fetch the file again"),
        (b"[]", "x is a JSON list: expected an object"),
        (b'{"a":[' + b"[]," * (1 << 21) + b"0]}", "x has more than 2097152 values"),
    ],
    ids=["empty", "no text", "digits", "deep", "a list", "many values"],
)
def test_json_that_is_none(text: bytes, says: str) -> None:
    with pytest.raises(MinisaError, match=says):
        parse_json(text, "x")
