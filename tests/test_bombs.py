"""Files that would take more memory or time than there is. Each is read by a process that has little of both."""

from __future__ import annotations

import json
import re
import resource
import signal
import struct
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minisa.checkpoint import open_checkpoint
from minisa.checkpoint.shards import read_weight_map
from minisa.errors import MinisaError
from minisa.sharing import SharingPlan
from minisa.text.spm import varint
from minisa.text.tokenizer import load_tokenizer
from tests.encode import encode_gguf, encode_safetensors, gguf_string
from tests.vocabularies import (
    byte_level_json,
    gguf_byte_level,
    gguf_sentencepiece,
    sentencepiece_json,
    sentencepiece_model,
    tekken_json,
    write_json,
)

MEMORY, SECONDS = 700 << 20, 20  # of address space above what torch takes; of time for each


def pickled(body: bytes, compression: int = zipfile.ZIP_STORED, name: str = "consolidated.00.pth") -> Callable:
    """A .pth whose pickle is `body`, in a folder with a params.json."""

    def write(folder: Path) -> Path:
        (folder / "params.json").write_text("{}")
        with zipfile.ZipFile(folder / name, "w", compression) as archive:
            archive.writestr("consolidated/data.pkl", b"\x80\x02" + body)
            archive.writestr("consolidated/data/0", bytes(64))
        return folder

    return write


def long_piece(folder: Path) -> Path:
    """One of sentencepiece's, every split of which would be looked at."""
    raw = sentencepiece_json(sentencepiece_model())
    raw["model"]["vocab"]["a" * 10_000_000] = len(raw["model"]["vocab"])
    return write_json(folder / "tokenizer.json", raw)


def directory(folder: Path) -> Path:
    """A .pth that is all directory: each entry takes 47 bytes of the file and ten times that in memory."""
    (folder / "params.json").write_text("{}")
    count = 1_000_000
    entries = (b"PK\1\2" + bytes(24) + b"\1" + bytes(17) + b"a") * count
    zip64 = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, len(entries), 0)
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, len(entries), 1)
    end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 65535, 65535, len(entries), 0, 0)
    (folder / "consolidated.00.pth").write_bytes(entries + zip64 + locator + end)
    return folder


def tensor(name: bytes, shape: bytes = b"K\x04K\x04\x86", stride: bytes = b"K\x04K\x01\x86") -> bytes:
    """The instructions for {name: a tensor of storage 0}, where a dictionary is on the stack."""
    storage = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x10tQ"
    arguments = b"(" + storage + b"K\x00" + shape + stride + b"\x89}t"
    return b"X" + struct.pack("<I", len(name)) + name + b"ctorch._utils\n_rebuild_tensor_v2\n" + arguments + b"Rs"


def sparse(name: str, head: bytes, size: int) -> Callable[[Path], Path]:
    """A file that has bytes only at its beginning; the rest are zeros that take no room on the disk."""

    def write(folder: Path) -> Path:
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(encode_safetensors({}, b""))
        with (folder / name).open("wb") as file:
            file.write(head)
            file.truncate(size)
        return folder / name if name.endswith((".gguf", ".model", "index.json")) else folder

    return write


def text(name: str, content: bytes) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(encode_safetensors({}, b""))
        (folder / name).write_bytes(content)
        return folder if name in ("config.json", "model.safetensors") else folder / name

    return write


def long_token(folder: Path) -> Path:
    """Twenty merges, each of which doubles a token, and of which one is missing: a million places to look for it."""
    tokens = ["a" * 2**n for n in range(1, 20)]
    raw = byte_level_json(merges=[f"{token[: len(token) // 2]} {token[: len(token) // 2]}" for token in tokens[:0:-1]])
    long = {token: 900 + number for number, token in enumerate(tokens)}
    raw["model"] |= {"ignore_merges": True, "vocab": raw["model"]["vocab"] | long}
    return write_json(folder / "tokenizer.json", raw)


def long_tokens(folder: Path) -> Path:
    """Merges in which every token of 1,024 bytes has as many splits to look up."""
    halves = [f"{number:04}" * 128 for number in range(140)]
    raw = byte_level_json(merges=[[left, right] for left in halves[:70] for right in halves[70:]])
    raw["model"] |= {
        "ignore_merges": True,
        "vocab": raw["model"]["vocab"] | {half: 900 + i for i, half in enumerate(halves)},
    }
    return write_json(folder / "tokenizer.json", raw)


def special_tokens(pre: str) -> Callable[[Path], Path]:
    """A GGUF file with a hundred thousand special tokens, each of which is tried as plain text."""

    def write(folder: Path) -> Path:
        by_name = gguf_byte_level(byte_level_json()) if pre == "gpt2" else gguf_sentencepiece(sentencepiece_model())
        count = 100_000
        by_name["tokenizer.ggml.tokens"] += [f"<{number}{'x' * 40}>" for number in range(count)]
        by_name["tokenizer.ggml.token_type"] += [3] * count
        if pre == "llama":
            by_name["tokenizer.ggml.scores"] += [0.0] * count
        (folder / "tokenizer.gguf").write_bytes(encode_gguf(by_name, {}))
        return folder / "tokenizer.gguf"

    return write


def long_replacement(folder: Path) -> Path:
    """A character that stands for twenty thousand, and special tokens that are full of it."""
    (folder / "rules.tsv").write_text("23\t" + "62 " * 20_000)
    model = sentencepiece_model(normalization_rule_tsv=str(folder / "rules.tsv"), control_symbols=["#" * 120])
    (folder / "tokenizer.model").write_bytes(model)
    return folder / "tokenizer.model"


def index_of_many(folder: Path) -> Path:
    """An index of a hundred thousand tensors, and a thousand files."""
    shards = [f"{number}.safetensors" for number in range(1023)]
    for shard in shards:
        empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
        (folder / shard).write_bytes(encode_safetensors({shard: empty}, b""))
    (folder / "z.safetensors").write_bytes(encode_safetensors({}, b""))
    weight_map = {shard: shard for shard in shards} | {f"x{number}": "z.safetensors" for number in range(100_000)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text("{}")
    return folder


def names_of_parts(folder: Path) -> Path:
    """Files of no bytes, each of which is by its name one of 99,999."""
    for number in range(100):
        (folder / f"{number}-00001-of-99999.gguf").touch()
    return folder


def tekken(**config: Any) -> Callable[[Path], Path]:
    raw = tekken_json()
    raw["config"] |= config
    return lambda folder: write_json(folder / "tekken.json", raw)


def gguf_array(code: int, count: int) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + gguf_string("k") + struct.pack("<IIQ", 9, code, count)


TRIE = struct.pack("<I", 1024) + b"\xff" * 1024 + b"a\0"  # sentencepiece's precompiled_charsmap
CHARSMAP = b"\x1a" + varint(3 + len(TRIE)) + b"\x12" + varint(len(TRIE)) + TRIE  # in a normalizer_spec
KEYS = ",".join(f'"k{i}":0' for i in range(200_000)).encode()
BOMBS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "pickle: tuples of tuples as a key": (
        pickled(b"})" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(60)) + b"K\x01s."),
        "a dictionary's key is no string",
    ),
    "pickle: a tuple 100,000 deep": (pickled(b"})" + b"\x85" * 100_000 + b"K\x01s."), "key is no string"),
    "pickle: an array of 2^40 bytes": (
        pickled(b"}X\1\0\0\0acbuiltins\nbytearray\n\x8a\x06" + (1 << 40).to_bytes(6, "little") + b"\x85Rs."),
        "refused: its pickle asks for builtins.bytearray",
    ),
    "pickle: a number of many digits": (pickled(b"I" + b"9" * 900_000 + b"\n."), "corrupt"),
    "pickle: a million lists": (pickled(b"]" * (1 << 20) + b"."), "its pickle is larger than 1 MiB"),
    "pickle: a zip bomb": (pickled(bytes(1 << 26), zipfile.ZIP_DEFLATED), "a compressed archive"),
    "pickle: thousands of tensors of the same bytes": (
        pickled(b"}" + b"".join(tensor(b"layers.%d.attention.wq.weight" % i) for i in range(4000)) + b"."),
        "has bytes of another tensor",
    ),
    "pickle: a stride of 0": (
        pickled(b"}" + tensor(b"norm.weight", b"\x8a\x05\0\0\0\0\1\x85", b"K\0\x85") + b"."),
        "is not contiguous",
    ),
    "pickle: an archive that is all directory": (directory, "a directory of 47000000 bytes in the archive"),
    "safetensors: a header of 4 GB": (
        sparse("model.safetensors", struct.pack("<Q", 4 << 30), 5 << 30), "claims a header of 4294967296 bytes"
    ),
    "safetensors: a header of empty lists": (
        text("model.safetensors", struct.pack("<Q", 24_000_007) + b'{"a":[' + b"[]," * 8_000_000 + b"0"),
        "the header has more than 2097152 values",
    ),
    "GGUF: 30 million numbers": (sparse("m.gguf", gguf_array(3, 30_000_000), 62 << 20), "more than 2097152 values"),
    "GGUF: 5 million arrays": (sparse("m.gguf", gguf_array(9, 5_000_000), 62 << 20), "more than 2097152 values"),
    "GGUF: 7 million strings": (sparse("m.gguf", gguf_array(8, 7_000_000), 62 << 20), "more than 2097152 values"),
    "GGUF: 1.9 million tensors": (
        sparse("m.gguf", b"GGUF" + struct.pack("<IQQ", 3, 1_900_000, 0), 62 << 20), "more than 2097152 values"
    ),
    "config.json: empty lists": (text("config.json", b'{"a":[' + b"[]," * 8_000_000 + b"[]]}"), "more than 2097152"),
    "config.json: the last of many keys twice": (text("config.json", b'{%s,"k199999":0}' % KEYS), "stands twice"),
    "config.json: 5 GB": (sparse("config.json", b"{", 5 << 30), "longer than 33554432 bytes"),
    "tokenizer.model: 5 GB": (sparse("tokenizer.model", b"", 5 << 30), "longer than 8388608 bytes"),
    "tokenizer.model: empty pieces": (text("tokenizer.model", b"\n\0" * (4 << 20)), "damaged"),
    "tokenizer.model: a trie of characters that leads out of itself": (
        text("tokenizer.model", sentencepiece_model() + CHARSMAP), "damaged"
    ),
    "tokenizer.model: a long special token": (
        text("tokenizer.model", sentencepiece_model(control_symbols=["a" * 200])), "a special token of 200 characters"
    ),
    "tokenizer.model: a character that becomes many": (long_replacement, "a character is replaced by 20000 bytes"),
    "tokenizer.model: a long piece": (
        text("tokenizer.model", sentencepiece_model(user_defined_symbols=["a" * 4000 + "b"])), "a piece of 4001"
    ),
    "tokenizer.model: empty lines": (text("tokenizer.model", b"IQ== 0\n" + b"\n" * (7 << 20)), "damaged"),
    "tokenizer.json: a long token": (long_token, "a token of more than 1024 bytes"),
    "tokenizer.json: merges of many long tokens": (long_tokens, "tokens of a length of more than 4194304"),
    "tokenizer.json: a long piece": (long_piece, "a piece of more than 256 characters"),
    "GGUF: 100,000 special tokens": (special_tokens("gpt2"), "100007 special tokens: expected at most 32768"),
    "GGUF: 100,000 control pieces": (special_tokens("llama"), "100007 special tokens: expected at most 32768"),
    "tekken.json: a million special tokens": (tekken(default_num_special_tokens=1_000_000), "expected 0 to 258"),
    "tekken.json: a pattern that never ends": (tekken(pattern=r"(?:\w+\w+)+(?!.)"), "is not one minisa knows"),
    "plan: a layer of many digits": (
        text("p.json", b'{"version": 1, "n_layers": 4, "followers": {"%s": {"leader": 1}}}' % (b"9" * 5000)),
        "follower '9",
    ),
    "plan: lists 100,000 deep": (text("p.json", b'{"version": ' + b"[" * 100_000), "not valid JSON"),
    "index: every tensor looked at for every file": (index_of_many, "z.safetensors: lacks 'x0'"),
    "GGUF: names that promise parts": (names_of_parts, "holds 100 GGUF models"),
    "index: a gigabyte": (sparse("model.safetensors.index.json", b"{", 1 << 30), "longer than 33554432 bytes"),
}  # fmt: skip


def read(path: Path) -> object:
    """The path, as the reader it is meant for reads it."""
    if path.name == "p.json":
        return SharingPlan.load(path)
    if path.name.endswith("index.json"):
        return read_weight_map(path)
    if path.name.startswith(("tekken", "tokenizer")):
        return load_tokenizer(path).encode("a" * 60)
    return open_checkpoint(path)


def read_all(paths: list[str]) -> None:
    """In the process of its own: what became of each path, and the seconds it took, a line of JSON each."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))

    def give_up(*_: object) -> None:
        raise KeyboardInterrupt(f"longer than {SECONDS} s")

    signal.signal(signal.SIGALRM, give_up)
    for path in paths:
        began = time.monotonic()
        signal.alarm(SECONDS)
        try:
            outcome = f"read: {read(Path(path))!r:.100}"
        except MinisaError as error:
            outcome = f"refused: {error}"
        except BaseException as error:
            outcome = f"{type(error).__name__}: {error}"
        signal.alarm(0)
        print(json.dumps([outcome, time.monotonic() - began]), flush=True)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_all_are_refused_within_bounds(tmp_path: Path) -> None:
    paths = []
    for number, (write, _) in enumerate(BOMBS.values()):
        (tmp_path / str(number)).mkdir()
        paths.append(write(tmp_path / str(number)))
    command = [sys.executable, "-m", "tests.test_bombs", *map(str, paths)]
    ran = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
    outcomes = [json.loads(line) for line in ran.stdout.splitlines()]
    assert len(outcomes) == len(BOMBS), f"{list(BOMBS)[len(outcomes)]} ended the process: {ran.stderr[-500:]}"
    for (name, (_, says)), (outcome, seconds) in zip(BOMBS.items(), outcomes, strict=True):
        assert outcome.startswith("refused: "), f"{name}: {outcome}"
        assert re.search(re.escape(says), outcome), f"{name}: {outcome}"
        assert seconds < SECONDS
        assert len(outcome) < 1100


if __name__ == "__main__":
    read_all(sys.argv[1:])
