"""Changes to a sound file: to the values in it, its syntax kept, where it is JSON or another format known here; to its
bytes; and words that minisa looks for put in.

What is cut or flipped blindly ends in the first check of a parser. What lies behind it sees files like these.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import functools
import io
import itertools
import json
import math
import pickle
import pickletools
import random
import re
import struct
import tempfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2

from minisa.checkpoint.gguf import read_gguf
from minisa.text.spm import _float, _message, _number, varint_at
from tests.encode import encode_gguf

Parsed = tuple[Any, Callable[[Any], bytes]]  # a tree of lists and dictionaries, and what makes a file of such a tree


def changed(content: bytes, chance: random.Random) -> bytes:
    """One to four changes: mostly to the values in it, where its format is known; to its bytes else."""
    times = chance.randint(1, 4)
    if chance.random() < 0.8 and (parsed := parse(content)):
        tree, encode = parsed
        for _ in range(times):
            change_tree(tree, chance)
        with contextlib.suppress(struct.error, ArithmeticError, ValueError, TypeError, AttributeError, LookupError):
            return encode(tree)  # not every value has a place in a file
    return changed_bytes(content, chance, times)


def parse(content: bytes) -> Parsed | None:
    """The values in a file of a format known here; None for another, and for what has lost its syntax."""
    formats = {
        b"GGUF": _gguf, b"PK": _zip, b"\x80\x02": _pickle, b"\n": _sentencepiece, b"AA==": _tiktoken, b"{%": _template
    }  # fmt: skip
    known = next((format for start, format in formats.items() if content.startswith(start)), _json)
    try:
        return known(content)
    except Exception:  # whatever a format's own library stumbles over
        return None


def _json(content: bytes) -> Parsed:
    """JSON, or what begins with it behind its length, as safetensors."""
    begin = 8 if content[8:9] == b"{" else 0
    end = begin + int.from_bytes(content[:begin], "little") if begin else len(content)

    def encode(tree: Any) -> bytes:
        text = json.dumps(tree, ensure_ascii=False).encode(errors="surrogatepass")
        return (len(text).to_bytes(begin, "little") if begin else b"") + text + content[end:]

    return json.loads(content[begin:end]), encode


def _gguf(content: bytes) -> Parsed:
    """Metadata, and type, shape and data of each tensor."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        header = read_gguf(Path(file.name))
    tensors = {
        info.name: [info.type.code, list(info.shape), content[info.offset : info.offset + info.nbytes]]
        for info in header.tensors
    }

    def encode(tree: Any) -> bytes:
        metadata, described = tree
        if metadata.get("general.alignment", 32) > 1 << 20:
            raise ValueError("gigabytes of padding")
        return encode_gguf(metadata, described)

    return [header.metadata, tensors], encode


def _zip(content: bytes) -> Parsed:
    """Names and contents of an archive's parts."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        parts = [[entry.filename, archive.read(entry)] for entry in archive.infolist()]

    def encode(tree: Any) -> bytes:
        file = io.BytesIO()
        with warnings.catch_warnings(action="ignore"), zipfile.ZipFile(file, "w") as archive:  # a name may come twice
            for name, part in tree:
                archive.writestr(name, part)
        return file.getvalue()

    return parts, encode


def _pickle(content: bytes) -> Parsed:
    """The instructions, one by one; a value among them stands for those that make it."""
    places = [place for _, _, place in pickletools.genops(content)]
    instructions: list[Any] = [
        content[begin:end] for begin, end in zip(places, [*places[1:], len(content)], strict=True)
    ]

    def encode(tree: Any) -> bytes:
        return b"".join(part if isinstance(part, bytes) else pickle.dumps(part, 2)[2:-1] for part in tree)

    return instructions, encode


def _sentencepiece(content: bytes) -> Parsed:
    """The fields of a protobuf message of messages: [number, value] each."""

    def fields(message: bytes, depth: int) -> list[Any]:
        found: list[Any] = []
        place = 0
        while place < len(message):
            tag, place = varint_at(message, place)
            match tag & 7:
                case 0:
                    value, place = varint_at(message, place)
                case 2:
                    length, place = varint_at(message, place)
                    inside = message[place : place + length]
                    value, place = fields(inside, depth - 1) if depth else inside, place + length
                case 5:
                    (value,), place = struct.unpack_from("<f", message, place), place + 4
                case other:
                    raise ValueError(f"wire type {other}")
            found.append([tag >> 3, value])
        return found

    def encode(tree: Any) -> bytes:
        message = b""
        for number, value in tree:
            if isinstance(value, int):
                message += _number(number, value % (1 << 64))
            elif isinstance(value, float):
                message += _float(number, value)
            else:
                value = value.encode() if isinstance(value, str) else value
                message += _message(number, encode(value) if isinstance(value, list) else value)
        return message

    return fields(content, 1), encode


def _tiktoken(content: bytes) -> Parsed:
    """Tokens and ranks in turn."""

    def encode(tree: Any) -> bytes:
        words = (word if isinstance(word, bytes) else str(word).encode() for word in tree)
        return b"".join(word + end for word, end in zip(words, itertools.cycle((b" ", b"\n"))))

    return content.split(), encode


def _template(content: bytes) -> Parsed:
    """The words of a chat template."""
    words = [word for _, _, word in jinja2.Environment().lex(content.decode())]

    def encode(tree: Any) -> bytes:
        text = "".join(word if isinstance(word, str) else f" {word} " for word in tree)
        return text.encode(errors="surrogatepass")

    return words, encode


def change_tree(tree: Any, chance: random.Random) -> None:
    """A value is replaced, removed, taken from elsewhere in the tree, exchanged or put under a word known to minisa."""
    if not tree or not isinstance(tree, dict | list):
        return
    node, key = place_in(tree, chance)
    match chance.randrange(5):
        case 0:
            node[key] = odd_value(chance)
        case 1:
            del node[key]
        case 2:
            there, place = place_in(tree, chance)
            node[key] = copy.deepcopy(there[place])
        case 3:
            there, place = place_in(tree, chance)
            node[key], there[place] = copy.deepcopy(there[place]), copy.deepcopy(node[key])
        case 4 if isinstance(node, dict):
            node[chance.choice(words())] = odd_value(chance)
        case 4:
            node.insert(key, odd_value(chance))


def place_in(tree: Any, chance: random.Random) -> tuple[Any, Any]:
    """A list or dictionary somewhere in the tree, and the key or index of something in it."""
    while True:
        key = chance.choice(list(tree)) if isinstance(tree, dict) else chance.randrange(len(tree))
        child = tree[key]
        if not (isinstance(child, dict | list) and child) or chance.random() < 0.3:
            return tree, key
        tree = child


def odd_value(chance: random.Random) -> object:
    odd: list[object] = [None, True, False, -1, 0, 1, 2, 3, 0.5, 1e308, math.nan, 2**31, 10**30, "", "\ud800", [], {}]
    match chance.randrange(4):
        case 0:
            return chance.choice(words())
        case 1:
            return [chance.choice(odd) for _ in range(chance.randint(1, 4))]
        case 2:
            return {chance.choice(words()): chance.choice((*odd, *words())) for _ in range(chance.randint(1, 4))}
    return chance.choice(odd)


@functools.cache
def words() -> list[str]:
    """The strings in minisa's source that may be a key or a value of a file."""
    found = set()
    for file in (Path(__file__).parents[1] / "minisa").rglob("*.py"):
        nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        found |= {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return sorted(word for word in found if re.fullmatch(r"[\w.<>|/-]{2,40}", word))


def changed_bytes(seed: bytes, chance: random.Random, times: int) -> bytes:
    """Bytes flipped, numbers made huge, pieces cut out, doubled or cut off, words put in."""
    content = bytearray(seed)
    for _ in range(times):
        place = int(len(content) * chance.random() ** chance.choice((1, 3)))  # more often near the beginning
        match chance.randrange(7):
            case 0:
                content[place : place + 1] = bytes([chance.randrange(256)])
            case 1:
                content[place : place + 8] = chance.choice((b"\xff" * 8, bytes(8), b"\0" * 7 + b"\x7f"))
            case 2:
                del content[place : place + chance.randint(1, 64)]
            case 3:
                content[place:place] = content[place : place + chance.randint(1, 64)]
            case 4:
                del content[place:]
            case 5:
                numbers = list(re.finditer(rb"\d+", bytes(content[:20_000])))
                if numbers:
                    begin, end = chance.choice(numbers).span()
                    content[begin:end] = chance.choice((b"-1", b"1e999", b"NaN", b"null", b"[]", b"9" * 400, b'"x"'))
            case 6:
                word = chance.choice(words()).encode()
                content[place : place + len(word)] = word
    return bytes(content)
