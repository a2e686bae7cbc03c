"""Files cut short, and files with anything in them: each opens, or ends in one MinisaError that names it."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minisa.checkpoint import load_weights, open_checkpoint
from minisa.checkpoint.pth import read_pth
from minisa.checkpoint.safetensors import read_safetensors
from minisa.errors import MinisaError
from tests.encode import encode_safetensors, repack_zip
from tests.tiny import empty_model, random_weights, tiny_config, write_gguf, write_hf, write_meta, write_mistral

CONFIG = tiny_config(dim=32, n_layers=1, n_heads=2, n_kv_heads=1, hidden_dim=32, vocab_size=32)
FUZZ = settings(max_examples=150, deadline=None, database=None, suppress_health_check=list(HealthCheck))


def opens_or_says_why(path: Path) -> str | None:
    """Open and load the checkpoint at `path`; the error's message, or None when all is well."""
    try:
        checkpoint = open_checkpoint(path)
        if checkpoint.config.n_layers <= 4:  # a lie of thousands only takes time to build
            load_weights(empty_model(checkpoint.config), checkpoint, device="cpu", dtype=torch.float32)
        return None
    except MinisaError as error:
        message = str(error)
    assert str(path) in message
    assert "\n" not in message
    return message


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """A checkpoint of each format that nothing is wrong with: where to open it, and its file of weights."""
    weights = random_weights(CONFIG)

    def write(format: str) -> tuple[Path, Path]:
        path = tmp_path_factory.mktemp(format)
        if format == "gguf":
            tokens = {"tokenizer.ggml.tokens": [f"t{i}" for i in range(32)], "nested": [[1, 2], ["x"]]}
            file = write_gguf(path / "model.gguf", CONFIG, weights, type="Q4_1", metadata=tokens)
            return file, file
        if format == "hf":
            return write_hf(path, CONFIG, weights), path / "model.safetensors"
        if format == "meta":
            return write_meta(path, CONFIG, weights), path / "consolidated.00.pth"
        return write_mistral(path, CONFIG, weights), path / "consolidated.safetensors"

    return write


ALL = ("gguf", "hf", "meta", "mistral")


@pytest.mark.parametrize("format", ALL)
def test_truncated_anywhere(format: str, sound: Callable[[str], tuple[Path, Path]]) -> None:
    path, file = sound(format)
    content = file.read_bytes()
    assert opens_or_says_why(path) is None
    header = 4096
    cuts = {*range(64), *range(64, header, 37), *range(header, len(content), len(content) // 40), len(content) - 1}
    for cut in sorted(cuts):
        file.write_bytes(content[:cut])
        assert opens_or_says_why(path), f"cut at {cut} of {len(content)}"


@pytest.mark.parametrize("format", ALL)
def test_flipped_bits(format: str, sound: Callable[[str], tuple[Path, Path]]) -> None:
    """Any few bytes of the header (for .pth also of the directory at the end) may be anything."""
    path, file = sound(format)
    content = file.read_bytes()
    places = st.integers(0, 3000) | st.integers(len(content) - 2000, len(content) - 1)

    @FUZZ
    @given(st.lists(st.tuples(places, st.integers(0, 255)), min_size=1, max_size=4))
    def check(edits: list[tuple[int, int]]) -> None:
        edited = bytearray(content)
        for place, byte in edits:
            edited[place] = byte
        file.write_bytes(edited)
        opens_or_says_why(path)

    check()


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, -1, 10**400, 1 << 62])
    | st.floats()
    | st.text(max_size=5),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3),
    max_leaves=5,
)


@pytest.mark.parametrize(
    ("format", "file"), [("hf", "config.json"), ("meta", "params.json"), ("mistral", "params.json")]
)
def test_descriptions_with_anything_in_them(format: str, file: str, sound: Callable[[str], tuple[Path, Path]]) -> None:
    """A value of config.json or params.json may be any JSON, and so may the whole."""
    path, _ = sound(format)
    description = json.loads((path / file).read_text())
    if format == "hf":
        description["rope_scaling"] = {"rope_type": "linear", "factor": 2.0}

    @FUZZ
    @given(st.sampled_from(sorted(description)), JSON_VALUES)
    def check_value(key: str, value: Any) -> None:
        (path / file).write_text(json.dumps(description | {key: value}))
        opens_or_says_why(path)

    check_value()
    for whole in (b"", b"[]", b"3", b"{", b"\xff", b"[" * 100_000, b'{"dim": 1, "dim": 2}', b"{}", b"9" * 10_000):
        (path / file).write_bytes(whole)
        assert opens_or_says_why(path)


@given(JSON_VALUES)
@FUZZ
def test_safetensors_headers_with_anything_in_them(tmp_path_factory: pytest.TempPathFactory, value: Any) -> None:
    file = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    for header in (value, {"x": value}, {"x": {"dtype": "F32", "shape": value, "data_offsets": [0, 4]}}):
        file.write_bytes(encode_safetensors(header, bytes(4)))
        with suppress(MinisaError):
            read_safetensors(file)


def test_pickles_with_anything_in_them(tmp_path: Path) -> None:
    """The pickle of a .pth with a few bytes changed, in an archive whose checksums are right."""
    file = tmp_path / "consolidated.00.pth"
    torch.save({"a": torch.ones(40, 3), "b": torch.ones(7)}, file)
    content = file.read_bytes()
    with zipfile.ZipFile(file) as archive:
        length = next(entry.file_size for entry in archive.infolist() if entry.filename.endswith("data.pkl"))

    @FUZZ
    @given(st.lists(st.tuples(st.integers(0, length - 1), st.integers(0, 255)), min_size=1, max_size=3))
    def check(edits: list[tuple[int, int]]) -> None:
        def edit(name: str, part: bytes) -> bytes:
            edited = bytearray(part)
            for place, byte in edits if name.endswith("data.pkl") else ():
                edited[place] = byte
            return bytes(edited)

        file.write_bytes(content)
        repack_zip(file, edit)
        with suppress(MinisaError):
            for tensor in read_pth(file).values():
                if tensor.shape:
                    tensor.read_rows(0, tensor.shape[0])

    check()


INSTRUCTIONS = (
    b"}", b"]", b")", b"(", b"N", b"\x88", b"\x89", b"K\x02", b"M\0\4", b"\x8a\x09" + b"\xff" * 9,
    b"J\xff\xff\xff\xff", b"X\1\0\0\0a", b"X\7\0\0\0storage", b"X\1\0\0\x000", b"\x85", b"\x86", b"\x87", b"t",
    b"q\1", b"h\1", b"q\2", b"h\2", b"a", b"e", b"s", b"u", b"Q", b"R", b"b", b".", b"0", b"2", b"\x93", b"\x81",
    b"ctorch\nFloatStorage\n", b"ccollections\nOrderedDict\n", b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"ctorch._utils\n_rebuild_parameter\n", b"cbuiltins\nset\n",
)  # fmt: skip
STORAGE = b"(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\x000X\3\0\0\0cpuK\x10tQ"


@settings(FUZZ, max_examples=150)
@given(st.lists(st.sampled_from((*INSTRUCTIONS, STORAGE)), max_size=30))
def test_pickles_of_any_instructions(tmp_path_factory: pytest.TempPathFactory, instructions: list[bytes]) -> None:
    """Whatever a pickle says in torch's own words, and in some that it never uses."""
    file = tmp_path_factory.getbasetemp() / "any.pth"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE + b"K\0K\4\x85K\1\x85\x89}tR"
    for end in (b".", b"s.", b"u.", tensor + b"s."):
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("any/data.pkl", b"\x80\2}X\1\0\0\0a" + b"".join(instructions) + end)
            archive.writestr("any/data/0", bytes(64))
        with suppress(MinisaError):
            read_pth(file)


def paths_to_nothing(folder: Path) -> Iterator[tuple[Path, str]]:
    yield folder / "missing", "No such file or directory"
    yield folder / "missing" / "model.gguf", "No such file or directory"
    loop = folder / "loop.gguf"
    loop.symlink_to(loop)
    yield loop, "symbolic links"
    pipe = folder / "pipe.gguf"
    os.mkfifo(pipe)
    yield pipe, "neither a file nor a directory"
    locked = folder / "locked"
    locked.mkdir(mode=0)
    if not os.access(locked, os.R_OK):  # root may read it
        yield locked, "Permission denied"


@pytest.mark.skipif(os.name != "posix", reason="links, pipes and permissions of POSIX")
def test_paths_to_nothing(tmp_path: Path) -> None:
    for path, message in paths_to_nothing(tmp_path):
        assert message in (opens_or_says_why(path) or "")
