"""Every reader of files, with its file replaced, cut or changed: what is not read is refused in one line that names it.

`python -m tests.fuzz READER` does the same by hand, for as long as you like.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from minisa.errors import MAX_LENGTH, MinisaError
from tests.changes import changed
from tests.fuzz_readers import READERS, Reader

MAY_BE_MISSING = ("tokenizer_config.json", "chat template", "state")


@pytest.fixture(params=READERS)
def reader(request: pytest.FixtureRequest, tmp_path: Path) -> Reader:
    return READERS[request.param](tmp_path)


def read(reader: Reader, content: bytes) -> str | None:
    """The message of what is refused; None for what is read."""
    reader.file.write_bytes(content)
    return message_of(reader)


def message_of(reader: Reader) -> str | None:
    try:
        reader.read()
        return None
    except MinisaError as error:
        message = str(error)
    assert str(reader.named) in message
    assert message.isprintable()
    assert len(message) < MAX_LENGTH + 10
    return message


@pytest.mark.parametrize("replacement", ["nothing", "a folder", "a link to nothing"])
@pytest.mark.parametrize("name", READERS)
def test_something_else_in_the_place_of_a_file(name: str, replacement: str, tmp_path: Path) -> None:
    reader = READERS[name](tmp_path)
    reader.file.unlink()
    if replacement == "a folder":
        reader.file.mkdir()
    elif replacement == "a link to nothing":
        reader.file.symlink_to(reader.file.with_name("gone"))
    assert message_of(reader) is not None or name in MAY_BE_MISSING


def test_cut_short_anywhere(reader: Reader) -> None:
    """At every byte of the beginning and the end, and here and there between; a cut text can still be one."""
    content = reader.seed
    assert read(reader, content) is None
    edges = {*range(24), *range(len(content) - 24, len(content))}
    for end in sorted(edges | set(range(0, len(content), max(len(content) // 40, 1)))):
        read(reader, content[:end])


def test_changed_at_random(reader: Reader) -> None:
    chance = random.Random(0)
    for _ in range(60):
        read(reader, changed(reader.seed, chance))


def test_messages_are_one_line_whatever_they_quote() -> None:
    message = str(MinisaError("a\nb\r\x1b[31m\x00c\u2028d\x85" + "e" * 10_000 + " end"))
    assert message.startswith("a b [31m c d eee")
    assert message.endswith("eee end")
    assert message.isprintable()
    assert len(message) < MAX_LENGTH + 10
