"""Every reader of files, with its file replaced, cut or changed: what is not read is refused in one line that names it.

tests/fuzz.py does the same by hand, for hours.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import operator
import os
import random
import signal
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from minisa.errors import MAX_LENGTH, MinisaError
from tests.changes import changed, parse
from tests.fuzz_readers import READERS, Reader

SECONDS = 10
PARSED = (
    "config.json",
    "params.json",
    "tokenizer.json",
    "tekken.json",
    "tokenizer_config.json",
    "chat template",
    "index",
    "plan",
    "safetensors",
    "delta",
    "gguf",
    "tokenizer.model",
    "tokenizer.gguf",
    "sentencepiece.gguf",
    "pickle",
)
FILES = list(READERS)

pytestmark = pytest.mark.skipif(os.name != "posix", reason="links, pipes and signals of POSIX")


@pytest.fixture(params=READERS)
def reader(request: pytest.FixtureRequest, tmp_path: Path) -> Reader:
    return READERS[request.param](tmp_path)


class GivenUpError(BaseException):
    """Took too long; not to be caught by what it interrupts."""


@contextmanager
def in_time() -> Iterator[None]:
    def give_up(*_: object) -> None:
        raise GivenUpError

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def read(reader: Reader) -> str | None:
    """The message of what is refused; None for what is read."""
    try:
        with in_time():
            reader.read()
        return None
    except MinisaError as error:
        message = str(error)
    assert str(reader.named) in message
    assert message.isprintable()
    assert len(message) < MAX_LENGTH + 10
    return message


def put(reader: Reader, content: bytes) -> None:
    reader.file.write_bytes(content)


REPLACEMENTS: dict[str, Callable[[Path], None]] = {
    "a pipe": os.mkfifo,
    "a folder": Path.mkdir,
    "nothing": lambda file: None,
    "a link to itself": lambda file: file.symlink_to(file),
    "a link to nothing": lambda file: file.symlink_to(file.with_name("gone")),
    "a device": lambda file: file.symlink_to("/dev/zero"),
}


@pytest.mark.parametrize("replacement", REPLACEMENTS)
@pytest.mark.parametrize("name", FILES)
def test_something_else_in_the_place_of_a_file(name: str, replacement: str, tmp_path: Path) -> None:
    reader = READERS[name](tmp_path)
    reader.file.unlink()
    REPLACEMENTS[replacement](reader.file)
    message = read(reader)
    if replacement == "nothing" and name in ("tokenizer_config.json", "chat template"):
        assert message is None  # a tokenizer without them
    else:
        assert message is not None or name == "state"  # none so far


@pytest.mark.parametrize("name", FILES)
def test_a_link_to_a_file_elsewhere_is_that_file(name: str, tmp_path: Path) -> None:
    """As Hugging Face's cache has them."""
    (tmp_path / "model").mkdir()
    reader = READERS[name](tmp_path / "model")
    reader.file.symlink_to(reader.file.rename(tmp_path / "blob"))
    assert read(reader) is None


def test_cut_short_anywhere(reader: Reader) -> None:
    """At every byte of the beginning and the end, and here and there between; a cut TOML or text can still be one."""
    content = reader.seed
    assert read(reader) is None
    edges = {*range(24), *range(len(content) - 24, len(content))}
    for cut in sorted(edges | set(range(0, len(content), max(len(content) // 40, 1)))):
        put(reader, content[:cut])
        read(reader)


def test_changed_at_random(reader: Reader) -> None:
    chance = random.Random(0)
    for _ in range(60):
        put(reader, changed(reader.seed, chance))
        read(reader)


WRONG = (None, True, -1, 10**30, 1e999, math.nan, "x\n", "\ud800", [], [[]], {}, {"": None})


def nodes(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The places in a JSON value, the whole of it first; of a long list or object the first ten."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in itertools.islice(items, 10):
        yield from nodes(child, (*path, key))


@pytest.mark.parametrize("name", PARSED)
def test_values_of_the_wrong_type(name: str, tmp_path: Path) -> None:
    """Every value of the file, in turn, is another: an odd one, or what stands beside it."""
    reader = READERS[name](tmp_path)
    parsed = parse(reader.seed)
    assert parsed is not None
    tree, encode = parsed
    put(reader, encode(tree))
    assert read(reader) is None
    for *inside, key in filter(None, nodes([tree])):
        parent = functools.reduce(operator.getitem, inside, whole := [tree])
        value = parent[key]
        siblings = list(parent.values() if isinstance(parent, dict) else parent)
        for wrong in [*WRONG, *siblings[:20]]:
            parent[key] = wrong
            if content := encoded(whole[0], encode):
                put(reader, content)
                read(reader)
        parent[key] = value


def encoded(tree: Any, encode: Callable[[Any], bytes]) -> bytes | None:
    """The file of a tree; None where its format has no place for a value."""
    with contextlib.suppress(struct.error, ArithmeticError, ValueError, TypeError, AttributeError, LookupError):
        return encode(tree)
    return None


def test_messages_are_one_line_whatever_they_quote() -> None:
    message = str(MinisaError("a\nb\r\x1b[31m\x00c\u2028d\x85" + "e" * 10_000 + " end"))
    assert message.startswith("a b [31m c d eee")
    assert message.endswith("eee end")
    assert len(message.splitlines()) == 1
    assert message.isprintable()
    assert len(message) < MAX_LENGTH + 10
