"""Damaged checkpoints, and headers that lie: one MinisaError of one line says what is wrong, and where."""

from __future__ import annotations

import json
import os
import struct
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minisa.checkpoint import load_weights, open_checkpoint, read_gguf
from minisa.checkpoint.pth import read_pth
from minisa.checkpoint.safetensors import read_safetensors
from minisa.errors import MinisaError
from tests.encode import encode_gguf, encode_safetensors, gguf_string, repack_zip, write_safetensors
from tests.tiny import empty_model, random_weights, tiny_config, write_gguf, write_hf, write_meta, write_mistral

CONFIG = tiny_config(dim=32, n_layers=1, n_heads=2, n_kv_heads=1, hidden_dim=32, vocab_size=32)
FUZZ = settings(max_examples=100, deadline=None, database=None, suppress_health_check=list(HealthCheck))


def refused(read: Callable[[Path], Any], path: Path, says: str) -> None:
    with pytest.raises(MinisaError, match=says) as raised:
        read(path)
    assert str(path.parent) in str(raised.value) and "\n" not in str(raised.value)


def f32(shape: list[Any], start: int, end: int, **other: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [start, end], **other}


def described(header: Any) -> bytes:
    return encode_safetensors(header, bytes(8))


SAFETENSORS = {
    "empty": (b"", "0 bytes is too short"),
    "a length beyond the file": (struct.pack("<Q", 1 << 63) + b"{}", "claims a header of 9223372036854775808 bytes"),
    "no JSON": (struct.pack("<Q", 2) + b"{]", "the header is not valid JSON"),
    "no object": (struct.pack("<Q", 2) + b"[]", "the header is a JSON list: expected an object"),
    "lists in lists": (struct.pack("<Q", 200_000) + b"[" * 200_000, "the header is not valid JSON"),
    "overlap": (described({"a": f32([2], 0, 8), "b": f32([1], 4, 8)}), "'b' overlaps the tensor before it"),
    "same bytes twice": (described({"a": f32([2], 0, 8), "b": f32([2], 0, 8)}), "'b' overlaps the tensor before it"),
    "hole": (described({"a": f32([1], 4, 8)}), "'a' leaves a gap before it"),
    "bytes nobody owns": (described({"a": f32([1], 0, 4)}), "describes .* bytes, the file has"),
    "size and shape disagree": (described({"a": f32([3], 0, 8)}), "does not take the bytes 0 to 8"),
    "absurd shape": (described({"a": f32([1 << 62, 1 << 62], 0, 8)}), "does not take the bytes"),
    "absurd offset": (described({"a": f32([2], 0, 1 << 70)}), "expected whole numbers"),
    "negative shape": (described({"a": f32([-2, -1], 0, 8)}), "expected whole numbers"),
    "true as shape": (described({"a": f32([True], 0, 4)}), "expected whole numbers"),
    "no dtype": (described({"a": {"shape": [2], "data_offsets": [0, 8]}}), "expected a known dtype"),
    "unknown dtype": (described({"a": f32([2], 0, 8) | {"dtype": "F4"}}), "'dtype': 'F4'.*expected a known dtype"),
    "no description": (described({"a": 3}), "'a' is 3: expected a known dtype"),
}


@pytest.mark.parametrize(("content", "says"), SAFETENSORS.values(), ids=SAFETENSORS)
def test_safetensors(content: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    refused(read_safetensors, tmp_path / "x.safetensors", f"x.safetensors: .*{says}")


INDEXES = {
    "empty": ({}, "weight_map is missing"),
    "a list": ({"weight_map": ["a"]}, "weight_map is missing"),
    "above": ({"weight_map": {"norm": "../elsewhere.safetensors"}}, "names '../elsewhere.safetensors': expected plain"),
    "absolute": ({"weight_map": {"norm": "/etc/x.safetensors"}}, "names '/etc/x.safetensors': expected plain"),
    "hidden": ({"weight_map": {"norm": ".hidden.safetensors"}}, "names '.hidden.safetensors': expected plain"),
    "another format": ({"weight_map": {"norm": "model.bin"}}, "names 'model.bin': expected plain .safetensors file"),
    "many": ({"weight_map": {f"{i}": f"{i}.safetensors" for i in range(1025)}}, "names 1025 files: expected at most"),
    "missing": ({"weight_map": {"norm": "gone.safetensors"}}, "gone.safetensors: missing, and .* lists it"),
    "lacking": ({"weight_map": {"norm": "part.safetensors"}}, "part.safetensors: lacks 'norm', which .* says it holds"),
}


@pytest.mark.parametrize(("index", "says"), INDEXES.values(), ids=INDEXES)
def test_index(index: Any, says: str, tmp_path: Path) -> None:
    path = write_hf(tmp_path / "model", CONFIG, random_weights(CONFIG))
    write_safetensors(tmp_path / "elsewhere.safetensors", {"norm": torch.ones(3)})
    (path / "model.safetensors").rename(path / "part.safetensors")
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(open_checkpoint, path, says)


def gguf_file(n_tensors: int, n_pairs: int, header: bytes = b"", data: int = 64) -> bytes:
    """A GGUF file that claims so many tensors and metadata pairs, and `data` bytes of weights."""
    head = b"GGUF" + struct.pack("<IQQ", 3, n_tensors, n_pairs) + header
    return head + bytes(-len(head) % 32 + data)


def with_value(code: int, raw: bytes = b"", key: str = "k") -> bytes:
    return gguf_file(0, 1, gguf_string(key) + struct.pack("<I", code) + raw)


def with_array(code: int, count: int, raw: bytes = b"") -> bytes:
    return with_value(9, struct.pack("<IQ", code, count) + raw)


def with_tensors(*infos: tuple[str, tuple[int, ...], int, int], data: int = 64) -> bytes:
    """infos: name, dimensions in ggml's order, type code, offset."""
    header = b"".join(
        gguf_string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, code, offset)
        for name, dims, code, offset in infos
    )
    return gguf_file(len(infos), 0, header, data)


HUGE = (1 << 64) - 1
GGUF = {
    "another format": (b"PK\3\4" + bytes(100), r"not a GGUF file \(it begins with b'PK"),
    "magic only": (b"GGUF", "the file ends inside its header"),
    "version 1": (b"GGUF" + struct.pack("<I", 1) + bytes(100), "GGUF version 1 is not supported: expected 2 or 3"),
    "many pairs": (gguf_file(0, HUGE), f"at {HUGE} metadata pairs"),
    "many tensors": (gguf_file(HUGE, 0), f"at {HUGE} tensors"),
    "long key": (gguf_file(0, 1, struct.pack("<Q", HUGE)), f"at a string of {HUGE} bytes"),
    "long array": (with_array(4, HUGE), f"at {HUGE} numbers"),
    "long array of arrays": (with_array(9, HUGE), f"at {HUGE} arrays"),
    "deep arrays": (with_array(9, 1, struct.pack("<IQ", 9, 1) * 50), "arrays nested more than 4 deep"),
    "unknown value type": (with_value(13), "a value of type 13, which GGUF does not define"),
    "alignment 0": (with_value(4, bytes(4), "general.alignment"), "general.alignment is 0: expected a power of two"),
    "no dimensions": (with_tensors(("t", (), 0, 0)), r"'t' of shape \[\] cannot be made of F32"),
    "no elements": (with_tensors(("t", (0, 4), 0, 0)), r"'t' of shape \[4, 0\] cannot be made of F32"),
    "parted blocks": (with_tensors(("t", (33, 4), 8, 0)), r"'t' of shape \[4, 33\] cannot be made of Q8_0 blocks"),
    "unknown ggml type": (with_tensors(("t", (4,), 77, 0)), "'t' has type 77, which minisa does not know"),
    "tensor twice": (with_tensors(("t", (4,), 0, 0), ("t", (4,), 0, 32)), "the tensor 't' stands twice"),
    "absurd shape": (with_tensors(("t", (HUGE,) * 4, 0, 0)), "'t' ends .* bytes after the file"),
    "one byte short": (with_tensors(("t", (8,), 0, 0), data=31), "'t' ends 1 bytes after the file"),
    "misaligned": (with_tensors(("t", (4,), 0, 4)), "'t' is misaligned or overlaps"),
    "overlap": (with_tensors(("t", (16,), 0, 0), ("u", (4,), 0, 32)), "'u' is misaligned or overlaps another"),
}


@pytest.mark.parametrize(("content", "says"), GGUF.values(), ids=GGUF)
def test_gguf(content: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(content)
    refused(open_checkpoint, tmp_path / "m.gguf", f"m.gguf: .*{says}")


def test_a_model_that_no_description_fits(tmp_path: Path) -> None:
    """The file's name stands before what is wrong with its metadata, or with its rope_freqs.weight."""
    weights = random_weights(CONFIG)
    for metadata in ({"general.architecture": "qwen2"}, {"split.count": 3}, {"llama.attention.head_count": "many"}):
        file = write_gguf(tmp_path / "m.gguf", CONFIG, weights, metadata=metadata)
        refused(open_checkpoint, file, r"m\.gguf: .*('qwen2'|the first of 3 parts|head_count is 'many')")
    sound = read_gguf(write_gguf(tmp_path / "m.gguf", CONFIG, weights)).metadata
    for factors in ([0.0] * 8, [float("nan")] * 8, [1.0] * (1 << 17)):
        data = struct.pack(f"<{len(factors)}f", *factors)
        file.write_bytes(encode_gguf(sound, {"rope_freqs.weight": (0, (len(factors),), data)}))
        refused(open_checkpoint, file, r"m\.gguf: rope_freqs\.weight.*: expected")


class Payload:
    """Unpickling this would write a file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch ran",)


def saved(content: Any, **options: Any) -> Callable[[Path], None]:
    return lambda file: torch.save(content, file, **options)


def repacked(
    edit: Callable[[str, bytes], bytes | None], compression: int = zipfile.ZIP_STORED
) -> Callable[[Path], None]:
    """`a` and `b`, in an archive whose parts were edited, and which torch did not write."""

    def write(file: Path) -> None:
        torch.save({"a": torch.zeros(1000), "b": torch.ones(1000)}, file)
        repack_zip(file, edit, compression)

    return write


def unpadded(file: Path) -> None:
    repacked(lambda _, part: part)(file)
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr(f"{file.stem}/.format_version", "1")


TWICE = torch.ones(1000)
PTH: dict[str, tuple[Callable[[Path], Any], str]] = {
    "code": (saved({"a": torch.ones(2), "x": Payload()}), r"refused: its pickle asks for .*\.system"),
    "a module": (saved({"x": torch.nn.Linear(2, 2)}), r"refused: its pickle asks for torch\.nn\.modules\.linear"),
    "empty": (lambda file: file.write_bytes(b""), "no zip archive: fetch it again"),
    "not padded as it says": (unpadded, "'b' does not lie in its part of the archive"),
    "before torch 1.6": (saved({"a": TWICE}, _use_new_zipfile_serialization=False), "no zip .* torch older than 1.6"),
    "compressed": (repacked(lambda _, part: part, zipfile.ZIP_DEFLATED), "a compressed archive"),
    "data missing": (repacked(lambda name, part: None if "/data/" in name else part), "damaged"),
    "longer than its part": (
        repacked(lambda _, part: part.replace(b"M" + struct.pack("<H", 1000), b"M\xff\xff", 2)),
        "'a' does not lie in its part of the archive",
    ),
    "same bytes twice": (
        saved({"layers.0.attention_norm.weight": TWICE, "norm.weight": TWICE[:4]}), "has bytes of another tensor"
    ),
    "a list": (saved([torch.ones(2)]), "expected a dictionary of tensors, found list"),
    "nested": (saved({"model": {"a": torch.ones(2)}}), "'model' holds a dict: expected a dictionary of plain tensors"),
    "numbered": (saved({3: torch.ones(2)}), "a key that is no name holds a Tensor"),
    "transposed": (saved({"a": torch.ones(2, 3).T}), "'a' is not contiguous: expected plain tensors"),
    "repeated": (saved({"a": torch.ones(1).expand(1 << 40)}), "'a' is not contiguous: expected plain tensors"),
    "sparse": (saved({"a": torch.eye(3).to_sparse()}), "'a' holds a Tensor: expected a dictionary of plain tensors"),
    "integers": (saved({"tok_embeddings.weight": torch.ones(2, 2, dtype=torch.int8)}), "is stored as int8"),
    "no embedding": (saved({"norm.weight": torch.ones(2)}), "lack a matrix tok_embeddings.weight"),
}  # fmt: skip


@pytest.mark.parametrize(("write", "says"), PTH.values(), ids=PTH)
def test_pth(write: Callable[[Path], Any], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = write_meta(tmp_path / "model", CONFIG, random_weights(CONFIG))
    write(path / "consolidated.00.pth")
    refused(open_checkpoint, path, says)
    assert not (tmp_path / "ran").exists()


def test_ranks_that_are_not_of_one_model(tmp_path: Path) -> None:
    path = write_meta(tmp_path, CONFIG, random_weights(CONFIG), shards=2)
    first, second = path / "consolidated.00.pth", path / "consolidated.01.pth"
    whole: dict[str, Any] = torch.load(second, weights_only=True)
    torch.save(whole | {"norm.weight": torch.ones(5)}, second)
    refused(open_checkpoint, path, r"consolidated\.01\.pth: 'norm\.weight' has shape \[5\], and \[32\] in")
    del whole["norm.weight"]
    torch.save(whole, second)
    refused(open_checkpoint, path, r"'norm\.weight' is not in every shard")
    first.unlink()
    refused(open_checkpoint, path, r"consolidated\.00\.pth: missing, and consolidated\.01\.pth is there")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.float64])
def test_a_dtype_that_is_no_weights(dtype: torch.dtype, tmp_path: Path) -> None:
    """Quantized by somebody else: read as plain numbers it would talk gibberish."""
    path = write_hf(tmp_path, CONFIG, random_weights(CONFIG))
    write_safetensors(path / "model.safetensors", {"model.norm.weight": torch.ones(32).to(dtype)})
    name = str(dtype).removeprefix("torch.")
    refused(open_checkpoint, path, rf"model\.norm\.weight is stored as {name}: expected fp32, fp16 or bf16")


@pytest.mark.parametrize("write", [write_hf, write_meta, write_gguf], ids=["safetensors", "pth", "gguf"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_no_numbers(write: Callable[..., Path], value: float, tmp_path: Path) -> None:
    weights = random_weights(CONFIG)
    weights["layers.0.feed_forward.w2.weight"][3, 5] = value
    with pytest.raises(MinisaError, match=r"layers\.0\.feed_forward\.w2\.weight: NaN or infinite weights in rows 0 to"):
        load(write(tmp_path / "m.gguf", CONFIG, weights))


def test_weights_beyond_a_dtype(tmp_path: Path) -> None:
    weights = random_weights(CONFIG)
    weights["layers.0.feed_forward.w2.weight"][3, 5] = -70_000.0
    path = write_hf(tmp_path, CONFIG, weights)
    load(path, torch.bfloat16)
    with pytest.raises(MinisaError, match=r"w2\.weight: .* rows 0 to .* in fp16: .* take --dtype bf16"):
        load(path, torch.float16)


def load(path: Path, dtype: torch.dtype = torch.float32) -> None:
    checkpoint = open_checkpoint(path)
    if checkpoint.config.n_layers <= 4:  # a lie of thousands only takes time to build
        load_weights(empty_model(checkpoint.config), checkpoint, device="cpu", dtype=dtype)


def write_each(format: str, path: Path) -> tuple[Path, Path]:
    """A sound checkpoint of a format: where to open it, and its file of weights."""
    weights = random_weights(CONFIG)
    if format == "gguf":
        tokens = {"tokenizer.ggml.tokens": [f"t{i}" for i in range(32)], "nested": [[1, 2], ["x"]]}
        file = write_gguf(path / "model.gguf", CONFIG, weights, type="Q4_1", metadata=tokens)
        return file, file
    if format == "hf":
        return write_hf(path, CONFIG, weights), path / "model.safetensors"
    if format == "meta":
        return write_meta(path, CONFIG, weights), path / "consolidated.00.pth"
    return write_mistral(path, CONFIG, weights), path / "consolidated.safetensors"


@pytest.mark.parametrize("format", ["gguf", "hf", "meta", "mistral"])
def test_cut_anywhere_and_flipped_bytes(format: str, tmp_path: Path) -> None:
    """A file that was cut is always refused; with any few bytes of its header changed it is read or refused."""
    path, file = write_each(format, tmp_path)
    content = file.read_bytes()
    load(path)
    cuts = {*range(0, 4096, 61), *range(4096, len(content), len(content) // 30), len(content) - 1}
    for cut in sorted(cuts):
        file.write_bytes(content[:cut])
        refused(load, path, "model|consolidated")
    places = st.integers(0, 3000) | st.integers(len(content) - 2000, len(content) - 1)

    @FUZZ
    @given(st.lists(st.tuples(places, st.integers(0, 255)), min_size=1, max_size=4))
    def check(edits: list[tuple[int, int]]) -> None:
        edited = bytearray(content)
        for place, byte in edits:
            edited[place] = byte
        file.write_bytes(edited)
        with suppress(MinisaError):
            load(path)

    check()


def test_pickles_with_anything_in_them(tmp_path: Path) -> None:
    """The pickle of a .pth with a few bytes changed, in an archive whose checksums are right."""
    file = tmp_path / "consolidated.00.pth"
    torch.save({"a": torch.ones(40, 3), "b": torch.ones(7)}, file)
    content = file.read_bytes()

    @FUZZ
    @given(st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), min_size=1, max_size=3))
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
                tensor.read_rows(0, tensor.shape[0] if tensor.shape else 0)

    check()


@pytest.mark.parametrize(
    "whole", [b"", b"[]", b"3", b"{", b"\xff", b"[" * 100_000, b"{}", b"9" * 10_000, b'{"dim": NaN}']
)
@pytest.mark.parametrize("format", ["hf", "meta"])
def test_descriptions_that_are_none(format: str, whole: bytes, tmp_path: Path) -> None:
    path, _ = write_each(format, tmp_path)
    file = path / ("config.json" if format == "hf" else "params.json")
    file.write_bytes(whole)
    refused(load, path, file.name)


@pytest.mark.skipif(os.name != "posix", reason="links and pipes of POSIX")
def test_paths_to_nothing(tmp_path: Path) -> None:
    (tmp_path / "loop.gguf").symlink_to(tmp_path / "loop.gguf")
    os.mkfifo(tmp_path / "pipe.gguf")
    for name, says in (("missing", "No such file"), ("loop.gguf", "symbolic links"), ("pipe.gguf", "not a file")):
        refused(load, tmp_path / name, says)
