"""Headers that lie, one lie at a time: the MinisaError says what is wrong, and where."""

from __future__ import annotations

import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from minisa.checkpoint import gguf, load_weights, open_checkpoint, read_gguf
from minisa.checkpoint.safetensors import read_safetensors
from minisa.errors import MinisaError
from tests.encode import encode_gguf, encode_safetensors, gguf_string, gguf_value, repack_zip, write_safetensors
from tests.tiny import empty_model, random_weights, tiny_config, write_gguf, write_hf, write_meta

CONFIG = tiny_config(dim=32, n_layers=1, n_heads=2, n_kv_heads=1, hidden_dim=32, vocab_size=32)


def f32(shape: list[int], start: int, end: int, **other: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [start, end], **other}


SAFETENSORS_LIES = {
    "overlap": ({"a": f32([2], 0, 8), "b": f32([1], 4, 8)}, "'b' overlaps the tensor before it"),
    "same bytes twice": ({"a": f32([2], 0, 8), "b": f32([2], 0, 8)}, "'b' overlaps the tensor before it"),
    "hole": ({"a": f32([1], 4, 8)}, "'a' leaves a gap before it"),
    "past the end": ({"a": f32([4], 0, 16)}, "describes .* bytes, the file has .*: truncated"),
    "bytes nobody owns": ({"a": f32([1], 0, 4)}, "describes .* bytes, the file has"),
    "backwards": ({"a": f32([2], 8, 0)}, "does not take the bytes 8 to 0"),
    "size and shape disagree": ({"a": f32([3], 0, 8)}, r"F32 of shape \[3\] does not take the bytes 0 to 8"),
    "absurd shape": ({"a": f32([1 << 62, 1 << 62], 0, 8)}, "does not take the bytes"),
    "absurd offset": ({"a": f32([2], 0, 1 << 70)}, "data_offsets .*: expected two whole numbers"),
    "negative shape": ({"a": f32([-2, -1], 0, 8)}, "shape .*: expected at most 8 whole numbers"),
    "float shape": ({"a": f32([2.0], 0, 8)}, "shape .*: expected at most 8 whole numbers"),  # type: ignore[list-item]
    "true as shape": ({"a": f32([True], 0, 4)}, "shape .*: expected at most 8 whole numbers"),
    "many dimensions": ({"a": f32([1] * 9 + [2], 0, 8)}, "shape .*: expected at most 8 whole numbers"),
    "three offsets": ({"a": f32([2], 0, 8) | {"data_offsets": [0, 8, 8]}}, "expected two whole numbers"),
    "no dtype": ({"a": {"shape": [2], "data_offsets": [0, 8]}}, "expected an object with dtype, shape and data_off"),
    "unknown dtype": ({"a": f32([2], 0, 8) | {"dtype": "F4"}}, "dtype 'F4' is not supported"),
    "dtype of a wrong type": ({"a": f32([2], 0, 8) | {"dtype": ["F32"]}}, "dtype .* is not supported"),
    "no object": ({"a": 3}, "expected an object with dtype, shape and data_offsets"),
}


@pytest.mark.parametrize("lie", SAFETENSORS_LIES)
def test_safetensors_lies(lie: str, tmp_path: Path) -> None:
    header, message = SAFETENSORS_LIES[lie]
    file = tmp_path / "model.safetensors"
    file.write_bytes(encode_safetensors(header, bytes(8)))
    with pytest.raises(MinisaError, match=f"model.safetensors: .*{message}"):
        read_safetensors(file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes is too short"),
        (struct.pack("<Q", 1 << 63) + b"{}", "claims a header of 9223372036854775808 bytes in a file of 10"),
        (struct.pack("<Q", 20) + b"{}", "claims a header of 20 bytes in a file of 10"),
        (struct.pack("<Q", 2) + b"{]", "the header is not valid JSON"),
        (struct.pack("<Q", 2) + b"[]", "the header is a JSON list: expected an object"),
        (struct.pack("<Q", 2) + b"\xff\xff", "the header is not valid JSON"),
        (struct.pack("<Q", 200_000) + b"[" * 200_000, "the header is not valid JSON"),
        (struct.pack("<Q", 15) + b'{"a":1, "a": 2}', "the header is not valid JSON .'a' stands twice"),
    ],
)
def test_safetensors_headers_that_are_none(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(content)
    with pytest.raises(MinisaError, match=f"x.safetensors: {message}"):
        read_safetensors(file)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.float64])
def test_a_dtype_that_is_no_weights(dtype: torch.dtype, tmp_path: Path) -> None:
    """Quantized by somebody else: read as plain numbers it would talk gibberish."""
    path = write_hf(tmp_path, CONFIG, random_weights(CONFIG))
    write_safetensors(path / "model.safetensors", {"model.norm.weight": torch.ones(32).to(dtype)})
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(MinisaError, match=rf"model\.norm\.weight is stored as {name}: expected fp32, fp16 or bf16"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({}, "weight_map is missing or broken"),
        ({"weight_map": ["a"]}, "weight_map is missing or broken"),
        ({"weight_map": {}}, "weight_map is missing or broken"),
        ({"weight_map": {"norm": 3}}, "weight_map is missing or broken"),
        ({"weight_map": {"norm": "../elsewhere.safetensors"}}, "names '../elsewhere.safetensors': expected plain"),
        ({"weight_map": {"norm": "/etc/x.safetensors"}}, "names '/etc/x.safetensors': expected plain"),
        ({"weight_map": {"norm": "a\\b.safetensors"}}, "expected plain"),
        ({"weight_map": {"norm": ".hidden.safetensors"}}, "names '.hidden.safetensors': expected plain"),
        ({"weight_map": {"norm": "model.bin"}}, "names 'model.bin': expected plain .safetensors file names"),
        ({"weight_map": {"norm": ""}}, "names '': expected plain"),
        ({"weight_map": {f"{i}": f"{i}.safetensors" for i in range(1025)}}, "names 1025 files: expected at most 1024"),
        ({"weight_map": {"norm": "gone.safetensors"}}, "gone.safetensors: missing, and .* lists it"),
        ({"weight_map": {"norm": "part.safetensors"}}, "part.safetensors: lacks 'norm', which .* says it holds"),
    ],
)
def test_index_lies(index: Any, message: str, tmp_path: Path) -> None:
    path = write_hf(tmp_path / "model", CONFIG, random_weights(CONFIG))
    write_safetensors(tmp_path / "elsewhere.safetensors", {"norm": torch.ones(3)})
    (path / "model.safetensors").rename(path / "part.safetensors")
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(MinisaError, match=message):
        open_checkpoint(path)


def test_an_index_of_bin_files_names_no_others(tmp_path: Path) -> None:
    path = write_hf(tmp_path, CONFIG, random_weights(CONFIG), shards=2)
    (path / "model.safetensors.index.json").rename(path / "pytorch_model.bin.index.json")
    with pytest.raises(MinisaError, match=r"names 'model-00001-of-00002.safetensors': expected plain .bin file names"):
        open_checkpoint(path)


@pytest.mark.parametrize("shards", [1, 2])
def test_two_tensors_with_the_same_bytes(shards: int, tmp_path: Path) -> None:
    """Kilobytes that describe any number of gigabytes; in a safetensors file the header itself is refused."""
    weights = random_weights(CONFIG)
    weights["layers.0.feed_forward.w3.weight"] = weights["layers.0.feed_forward.w1.weight"]
    path = write_hf(tmp_path, CONFIG, dict(sorted(weights.items())), shards=shards, suffix=".bin")
    with pytest.raises(MinisaError, match=r"\.bin: 'model\.layers\.0\.mlp\..*' has bytes of another tensor"):
        open_checkpoint(path)


def gguf_file(n_tensors: int, n_pairs: int, header: bytes = b"", data: int = 64) -> bytes:
    """A GGUF file that claims so many tensors and metadata pairs, and `data` bytes of weights."""
    head = b"GGUF" + struct.pack("<IQQ", 3, n_tensors, n_pairs) + header
    return head + bytes(-len(head) % 32 + data)


def with_value(code: int, raw: bytes = b"", key: str = "k") -> bytes:
    return gguf_file(0, 1, gguf_string(key) + struct.pack("<I", code) + raw)


def with_array(code: int, count: int, raw: bytes = b"") -> bytes:
    return with_value(9, struct.pack("<IQ", code, count) + raw)


def with_alignment(value: Any) -> bytes:
    return gguf_file(0, 1, gguf_string("general.alignment") + gguf_value(value))


def with_tensors(*infos: tuple[str, tuple[int, ...], int, int], data: int = 64) -> bytes:
    """infos: name, dimensions in ggml's order, type code, offset."""
    header = b"".join(
        gguf_string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, code, offset)
        for name, dims, code, offset in infos
    )
    return gguf_file(len(infos), 0, header, data)


HUGE = (1 << 64) - 1
GGUF_LIES = {
    "empty": (b"", "not a GGUF file"),
    "another format": (b"PK\3\4" + bytes(100), r"not a GGUF file \(it begins with b'PK"),
    "magic only": (b"GGUF", "the file ends inside its header"),
    "version 1": (b"GGUF" + struct.pack("<I", 1) + bytes(100), "GGUF version 1 is not supported: expected 2 or 3"),
    "big-endian": (b"GGUF" + struct.pack(">I", 3) + bytes(100), "a big-endian GGUF file"),
    "many pairs": (gguf_file(0, HUGE), f"at {HUGE} metadata pairs"),
    "many tensors": (gguf_file(HUGE, 0), f"at {HUGE} tensors"),
    "long key": (gguf_file(0, 1, struct.pack("<Q", HUGE)), f"at a string of {HUGE} bytes"),
    "long string": (with_value(8, struct.pack("<Q", 1 << 40)), "at a string of 1099511627776 bytes"),
    "long array": (with_array(4, HUGE), f"at 'k' with {HUGE} values"),
    "long array of strings": (with_array(8, HUGE), f"at {HUGE} strings"),
    "long array of arrays": (with_array(9, HUGE), f"at 'k' with {HUGE} arrays"),
    "deep arrays": (with_array(9, 1, struct.pack("<IQ", 9, 1) * 50), "'k' nests arrays more than 4 deep"),
    "unknown value type": (with_value(13), "'k' has value type 13, which GGUF does not define"),
    "unknown item type": (with_array(99, 1), "'k' has value type 99, which GGUF does not define"),
    "boolean 2": (with_value(7, b"\2"), "'k' has a boolean that is neither 0 nor 1"),
    "key twice": (gguf_file(0, 2, (gguf_string("k") + gguf_value(1)) * 2), "the metadata key 'k' stands twice"),
    "alignment 0": (with_alignment(0), "general.alignment is 0: expected a power of two"),
    "alignment 48": (with_alignment(48), "general.alignment is 48: expected a power of two"),
    "alignment 2^31": (with_alignment(1 << 31), "general.alignment is 2147483648: expected a power of two"),
    "alignment text": (with_alignment("32"), "general.alignment is '32': expected a power of two"),
    "no dimensions": (with_tensors(("t", (), 0, 0)), "'t' has 0 dimensions: expected 1 to 4"),
    "five dimensions": (with_tensors(("t", (1,) * 5, 0, 0)), "'t' has 5 dimensions: expected 1 to 4"),
    "no elements": (with_tensors(("t", (0, 4), 0, 0)), r"'t' of shape \[4, 0\] cannot be made of F32"),
    "parted blocks": (with_tensors(("t", (33, 4), 8, 0)), r"'t' of shape \[4, 33\] cannot be made of Q8_0 blocks"),
    "unknown ggml type": (with_tensors(("t", (4,), 77, 0)), "'t' has type 77, which minisa does not know"),
    "removed ggml type": (with_tensors(("t", (4,), 4, 0)), "'t' has type 4, which minisa does not know"),
    "tensor twice": (with_tensors(("t", (4,), 0, 0), ("t", (4,), 0, 32)), "the tensor 't' stands twice"),
    "absurd shape": (with_tensors(("t", (HUGE,) * 4, 0, 0)), "'t' ends .* bytes after the file"),
    "absurd offset": (with_tensors(("t", (4,), 0, 1 << 40)), "'t' ends .* bytes after the file"),
    "one byte short": (with_tensors(("t", (8,), 0, 0), data=31), "'t' ends 1 bytes after the file"),
    "misaligned": (with_tensors(("t", (4,), 0, 4)), "'t' is misaligned or overlaps"),
    "overlap": (with_tensors(("t", (16,), 0, 0), ("u", (4,), 0, 32)), "'u' is misaligned or overlaps another"),
}


@pytest.mark.parametrize("lie", GGUF_LIES)
def test_gguf_lies(lie: str, tmp_path: Path) -> None:
    content, message = GGUF_LIES[lie]
    file = tmp_path / "m.gguf"
    file.write_bytes(content)
    with pytest.raises(MinisaError, match=f"m.gguf: .*{message}"):
        read_gguf(file)


def test_gguf_header_without_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long the file, what is kept of its header has a bound."""
    monkeypatch.setattr(gguf, "MAX_HEADER", 1 << 20)
    file = tmp_path / "m.gguf"
    file.write_bytes(with_array(0, 2 << 20) + bytes(4 << 20))
    with pytest.raises(MinisaError, match=r"m\.gguf: the header has no end in 1 MiB \(at 'k' with 2097152 values\)"):
        read_gguf(file)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"general.architecture": "qwen2"}, "general.architecture 'qwen2' is not supported: expected 'llama'"),
        ({"general.architecture": 3}, "general.architecture 3 is not supported"),
        ({"split.count": 3}, "by its metadata part 0 .counted from 0. of 3"),
        ({"llama.block_count": "many"}, "block_count is 'many': expected a whole number"),
        ({"llama.attention.head_count": 0}, "attention.head_count is 0"),
        ({"llama.expert_count": 8}, "mixture-of-experts"),
    ],
)
def test_gguf_that_is_no_llama(metadata: dict[str, Any], message: str, tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "m.gguf", CONFIG, random_weights(CONFIG), metadata=metadata)
    with pytest.raises(MinisaError, match=rf"m\.gguf: .*({message})"):
        open_checkpoint(file)


def test_a_merged_gguf_is_whole(tmp_path: Path) -> None:
    """llama-gguf-split leaves split.count in the file it merges, as 0."""
    file = write_gguf(tmp_path / "m.gguf", CONFIG, random_weights(CONFIG), metadata={"split.count": 0})
    assert open_checkpoint(file).unknown == ()


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        ([1.0] * 7, "rope_freqs.weight has 7 values: expected 8, half of head_dim"),
        ([1.0] * 7 + [0.0], "values that are not positive numbers"),
        ([1.0] * 7 + [float("nan")], "values that are not positive numbers"),
        ([1.0] * 7 + [1e-30], "a factor is .*: expected 0.001 to"),
        ([1.0] * (1 << 17), r"rope_freqs.weight is F32 \[131072\]: expected a vector of F32"),
    ],
)
def test_gguf_rope_factors_that_are_none(factors: list[float], message: str, tmp_path: Path) -> None:
    metadata = read_gguf(write_gguf(tmp_path / "m.gguf", CONFIG, random_weights(CONFIG))).metadata
    data = struct.pack(f"<{len(factors)}f", *factors)
    (tmp_path / "m.gguf").write_bytes(encode_gguf(metadata, {"rope_freqs.weight": (0, (len(factors),), data)}))
    with pytest.raises(MinisaError, match=message):
        open_checkpoint(tmp_path / "m.gguf")


class Payload:
    """Unpickling this would write a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.target}'",)


def test_a_pickle_that_carries_code_is_refused(tmp_path: Path) -> None:
    path = write_meta(tmp_path, CONFIG, random_weights(CONFIG))
    ran = tmp_path / "ran"
    torch.save({"tok_embeddings.weight": torch.ones(2, 2), "x": Payload(ran)}, path / "consolidated.00.pth")
    with pytest.raises(MinisaError, match=r"consolidated\.00\.pth: refused: its pickle asks for \w+\.system, .* code"):
        open_checkpoint(path)
    assert not ran.exists()


def saved(content: Any) -> Callable[[Path], None]:
    return lambda file: torch.save(content, file)


def compressed(file: Path) -> None:
    torch.save({"a": torch.zeros(1000)}, file)
    repack_zip(file, lambda _, part: part, zipfile.ZIP_DEFLATED)


def without_data(file: Path) -> None:
    torch.save({"a": torch.zeros(1000)}, file)
    repack_zip(file, lambda name, part: None if "/data/" in name else part)


def longer_than_its_data(file: Path) -> None:
    """`a` claims 1,050 elements, the last of which are another part's bytes."""
    torch.save({"a": torch.zeros(1000), "b": torch.zeros(1000)}, file)
    repack_zip(file, lambda _, part: part.replace(b"M" + struct.pack("<H", 1000), b"M" + struct.pack("<H", 1050), 2))


def far_away(file: Path) -> None:
    """The part of `a` is said to begin at byte 2⁶⁴ - 1."""
    torch.save({"a": torch.ones(2)}, file)
    with zipfile.ZipFile(file, "a") as archive:
        archive.getinfo(f"{file.stem}/data/0").header_offset = (1 << 64) - 1
        archive.writestr("more", "")  # so that the directory is written anew


def with_pickle(old: bytes, new: bytes) -> Callable[[Path], None]:
    """Sixteen bytes each of `a` and `b`, in whose pickle `new` stands in place of `old`."""

    def write(file: Path) -> None:
        torch.save({"a": torch.ones(4), "b": torch.ones(4, dtype=torch.int32)}, file)
        repack_zip(file, lambda name, part: part.replace(old, new) if name.endswith("/data.pkl") else part)

    return write


def with_two_of_a_name(file: Path) -> None:
    """torch looks for data/0 without regard to case."""
    torch.save({"a": torch.ones(2)}, file)
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr(f"{file.stem}/DATA/0", bytes(8))


PTH_LIES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "empty": (lambda file: file.write_bytes(b""), "not a zip archive"),
    "text": (lambda file: file.write_text("hello"), "not a zip archive"),
    "bare pickle": (lambda file: file.write_bytes(pickle.dumps({"a": 1})), "not a zip archive"),
    "before torch 1.6": (
        lambda file: torch.save({"a": torch.ones(2)}, file, _use_new_zipfile_serialization=False),
        "not a zip archive .* or older than torch 1.6",
    ),
    "compressed": (compressed, "a compressed archive"),
    "data missing": (without_data, "corrupt"),
    "longer than its data": (longer_than_its_data, "'a' does not lie inside its part of the archive"),
    "data of another kind": (with_pickle(b"FloatStorage", b"HalfStorage"), "'a' does not lie inside its part"),
    "data of two kinds": (with_pickle(b"X\1\0\0\x001", b"X\1\0\0\x000"), "its pickle: a storage of two kinds"),
    "data elsewhere": (with_pickle(b"q\x0cR", b"q\x0cR)b"), "its pickle: attributes for what is no dictionary"),
    "data twice": (with_two_of_a_name, "corrupt: two parts of one name"),
    "data far away": (far_away, "has no byte 18446744073709551615"),
    "negated": (saved({"tok_embeddings.weight": torch._neg_view(torch.ones(2, 2))}), "a tensor with metadata"),
    "a list": (saved([torch.ones(2)]), "expected a dictionary of tensors, found list"),
    "nothing": (saved({}), "expected a dictionary of tensors"),
    "nested": (saved({"model": {"a": torch.ones(2)}}), "'model' is a dict: expected a dictionary of tensors"),
    "numbered": (saved({3: torch.ones(2)}), "3 is a Tensor: expected a dictionary of tensors"),
    "transposed": (saved({"a": torch.ones(2, 3).T}), "'a' is not contiguous: expected plain tensors"),
    "sparse": (
        saved({"a": torch.eye(3).to_sparse()}),
        "pickle asks for torch._utils._rebuild_sparse_tensor",
    ),
    "integers": (saved({"tok_embeddings.weight": torch.ones(2, 2, dtype=torch.int8)}), "is stored as int8"),
    "no embedding": (saved({"norm.weight": torch.ones(2)}), "lack a matrix tok_embeddings.weight"),
    "flat embedding": (saved({"tok_embeddings.weight": torch.tensor(1.0)}), "lack a matrix tok_embeddings.weight"),
}


@pytest.mark.parametrize("lie", PTH_LIES)
def test_pth_lies(lie: str, tmp_path: Path) -> None:
    write, message = PTH_LIES[lie]
    path = write_meta(tmp_path, CONFIG, random_weights(CONFIG))
    write(path / "consolidated.00.pth")
    with pytest.raises(MinisaError, match=message):
        open_checkpoint(path)


@pytest.mark.parametrize("write", [write_hf, write_meta, write_gguf], ids=["safetensors", "pth", "gguf"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_no_numbers(write: Callable[..., Path], value: float, tmp_path: Path) -> None:
    weights = random_weights(CONFIG)
    weights["layers.0.feed_forward.w2.weight"][3, 5] = value
    path = write(tmp_path / "m.gguf", CONFIG, weights)
    model = empty_model(CONFIG)
    with pytest.raises(MinisaError, match=r"layers\.0\.feed_forward\.w2\.weight: NaN or infinite weights in rows 0 to"):
        load_weights(model, open_checkpoint(path), device="cpu", dtype=torch.float32)


def test_weights_beyond_a_dtype(tmp_path: Path) -> None:
    weights = random_weights(CONFIG)
    weights["layers.0.feed_forward.w2.weight"][3, 5] = -70_000.0
    checkpoint = open_checkpoint(write_hf(tmp_path, CONFIG, weights))
    load_weights(empty_model(CONFIG), checkpoint, device="cpu", dtype=torch.bfloat16)
    with pytest.raises(MinisaError, match=r"w2\.weight: .* rows 0 to .* in fp16: .* take --dtype bf16"):
        load_weights(empty_model(CONFIG), checkpoint, device="cpu", dtype=torch.float16)
