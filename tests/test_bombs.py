"""Small files that claim to be huge. Each is read by a process that has little memory and little time."""

from __future__ import annotations

import json
import resource
import signal
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from minisa.checkpoint import open_checkpoint
from minisa.errors import MinisaError
from minisa.text.tokenizer import load_tokenizer
from tests.encode import encode_safetensors, gguf_string
from tests.vocabularies import byte_level_json, sentencepiece_model, write_json

MEMORY, SECONDS = 700 << 20, 20  # of address space above what torch takes; of time for each

Write = Callable[[Path], Path]


def pickled(body: bytes, compression: int = zipfile.ZIP_STORED) -> Write:
    """A .pth whose pickle is `body`, in a folder with a params.json."""

    def write(folder: Path) -> Path:
        (folder / "params.json").write_text("{}")
        with zipfile.ZipFile(folder / "consolidated.00.pth", "w", compression) as archive:
            for name, part in (("data.pkl", b"\x80\x02" + body), ("version", b"3\n"), ("data/0", bytes(64))):
                archive.writestr(f"consolidated/{name}", part)
        return folder

    return write


def tensor(name: bytes, shape: bytes = b"K\x04K\x04\x86", stride: bytes = b"K\x04K\x01\x86") -> bytes:
    """The instructions for {name: a tensor of storage 0}, where a dictionary is on the stack."""
    storage = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x10tQ"
    arguments = b"(" + storage + b"K\x00" + shape + stride + b"\x89}t"
    return b"X" + struct.pack("<I", len(name)) + name + b"ctorch._utils\n_rebuild_tensor_v2\n" + arguments + b"Rs"


def begins(name: str, head: bytes, size: int = 0) -> Write:
    """A file in a Hugging Face folder that begins with `head`, and is filled to `size` by zeros that take no room."""

    def write(folder: Path) -> Path:
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(encode_safetensors({}, b""))
        with (folder / name).open("wb") as file:
            file.write(head)
            file.truncate(max(size, len(head)))
        return folder if name in ("config.json", "model.safetensors") else folder / name

    return write


def long_token(folder: Path) -> Path:
    """Twenty merges, each of which doubles a token, and of which one is missing: a million places to look for it."""
    tokens = ["a" * 2**n for n in range(1, 20)]
    raw = byte_level_json(merges=[f"{token[: len(token) // 2]} {token[: len(token) // 2]}" for token in tokens[:0:-1]])
    long = {token: 900 + number for number, token in enumerate(tokens)}
    raw["model"] |= {"ignore_merges": True, "vocab": raw["model"]["vocab"] | long}
    return write_json(folder / "tokenizer.json", raw)


def gguf_array(code: int, count: int) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + gguf_string("k") + struct.pack("<IIQ", 9, code, count)


SAME = b"".join(tensor(b"layers.%d.attention.wq.weight" % i) for i in range(4000))
ARRAY = b"cbuiltins\nbytearray\n\x8a\x06" + (1 << 40).to_bytes(6, "little") + b"\x85R"
REFUSED: dict[str, tuple[Write, str]] = {
    "pickle: an array of 2^40 bytes": (pickled(b"}X\1\0\0\0a" + ARRAY + b"s."), "damaged, or more than weights"),
    "pickle: a million lists": (pickled(b"]" * (1 << 20) + b"."), "expected a dictionary of tensors"),
    "pickle: a zip bomb": (pickled(bytes(1 << 28), zipfile.ZIP_DEFLATED), "a compressed archive"),
    "pickle: thousands of tensors of the same bytes": (pickled(b"}" + SAME + b"."), "has bytes of another tensor"),
    "pickle: a stride of 0": (
        pickled(b"}" + tensor(b"norm.weight", b"\x8a\x05\0\0\0\0\1\x85", b"K\0\x85") + b"."), "is not contiguous"
    ),
    "safetensors: a header of 4 GB": (
        begins("model.safetensors", struct.pack("<Q", 4 << 30), 5 << 30), "claims a header of 4294967296 bytes"
    ),
    "safetensors: a header of empty lists": (
        begins("model.safetensors", struct.pack("<Q", 24_000_007) + b'{"a":[' + b"[]," * 8_000_000 + b"0"),
        "the header has more than 2097152 values",
    ),
    "GGUF: 30 million numbers": (begins("m.gguf", gguf_array(3, 30_000_000), 62 << 20), "more than 2097152 values"),
    "GGUF: 5 million arrays": (begins("m.gguf", gguf_array(9, 5_000_000), 62 << 20), "more than 2097152 values"),
    "GGUF: 7 million strings": (begins("m.gguf", gguf_array(8, 7_000_000), 62 << 20), "more than 2097152 values"),
    "config.json: 5 GB": (begins("config.json", b"{", 5 << 30), "longer than 33554432 bytes"),
}  # fmt: skip
BOUNDED: dict[str, Write] = {  # read or refused, as the reader likes
    "tokenizer.model: 5 GB": begins("tokenizer.model", b"", 5 << 30),
    "tokenizer.model: empty pieces": begins("tokenizer.model", b"\n\0" * (4 << 20)),
    "tokenizer.model: a long piece": begins(
        "tokenizer.model", sentencepiece_model(user_defined_symbols=["a" * 4000 + "b"])
    ),
    "tokenizer.json: a long token": long_token,
}


def read_all(paths: list[str]) -> None:
    """In the process of its own: what became of each path, a line of JSON each."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    for path in map(Path, paths):
        signal.alarm(SECONDS)  # which ends the process
        try:
            if path.name.startswith("tokenizer"):
                load_tokenizer(path).encode("a" * 60)
            else:
                open_checkpoint(path)
            outcome = "read"
        except MinisaError as error:
            outcome = f"refused: {error}"
        print(json.dumps(outcome), flush=True)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_all_are_read_within_bounds(tmp_path: Path) -> None:
    writers = {name: write for name, (write, _) in REFUSED.items()} | BOUNDED
    paths = []
    for number, write in enumerate(writers.values()):
        (tmp_path / str(number)).mkdir()
        paths.append(str(write(tmp_path / str(number))))
    command = [sys.executable, "-m", "tests.test_bombs", *paths]
    ran = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
    outcomes = dict(zip(writers, map(json.loads, ran.stdout.splitlines()), strict=False))
    assert len(outcomes) == len(writers), f"{[*writers][len(outcomes)]} ended the process: {ran.stderr[-500:]}"
    for name, (_, says) in REFUSED.items():
        assert outcomes[name].startswith("refused: ") and says in outcomes[name], f"{name}: {outcomes[name]}"


if __name__ == "__main__":
    read_all(sys.argv[1:])
