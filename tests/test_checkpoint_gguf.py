"""GGUF: metadata of every type, ggml's quantizations bit for bit, and the `gguf` package as a second opinion."""

from __future__ import annotations

import math
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from minisa.checkpoint import ggml, load_weights, open_checkpoint, read_gguf
from minisa.errors import MinisaError
from minisa.text.tokenizer import load_tokenizer
from tests.encode import GGML_CODES, encode_gguf, gguf_string
from tests.loadable import loadable_gguf
from tests.tiny import empty_model, random_weights, split_gguf, tiny_config, write_gguf

TYPES = {type.name: type for type in ggml.TYPES.values()}
TWO, ONE = struct.pack("<e", 2.0), struct.pack("<e", 1.0)


def random_blocks(type: ggml.GGMLType, count: int, seed: int = 0) -> np.ndarray:
    """Random bits of a ggml type [count, nbytes]; the fp16 numbers of a block are finite and small."""
    generator = np.random.default_rng(seed)
    blocks = generator.integers(0, 256, (count, type.nbytes), dtype=np.uint8)
    scales = generator.normal(size=(count, 2)).astype(np.float16).view(np.uint8)  # in front, or at the end
    blocks[:, :4] = scales
    if type.block == 256:
        blocks[:, -2:] = scales[:, :2]
    return blocks


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q4_K", "Q6_K", "IQ4_XS", "TQ2_0"])
def test_decoders_are_ggmls_bit_for_bit(name: str) -> None:
    gguf = pytest.importorskip("gguf", reason='needs pip install "minisa[gguf]"')
    type = TYPES[name]
    blocks = random_blocks(type, 500)
    expected = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[name])
    decoded = ggml.decoder(type)(torch.from_numpy(blocks).view(50, 10, -1))
    assert decoded.dtype == torch.float32
    assert np.array_equal(decoded.view(500, -1).numpy(), expected)


@pytest.mark.parametrize(
    ("name", "block", "expected"),
    [
        ("Q4_0", TWO + bytes(range(16)), [2.0 * (i - 8) for i in (*range(16), *[0] * 16)]),
        ("Q4_1", TWO + ONE + bytes(range(16)), [2.0 * i + 1 for i in (*range(16), *[0] * 16)]),
        ("Q8_0", TWO + bytes([128, 255, *range(30)]), [2.0 * i for i in (-128, -1, *range(30))]),
    ],
)
def test_blocks_by_hand(name: str, block: bytes, expected: list[float]) -> None:
    """Worked out from the layout: weight i sits in byte i mod 16, the low half first."""
    decoded = ggml.decoder(TYPES[name])(torch.frombuffer(bytearray(block), dtype=torch.uint8).view(1, 1, -1))
    assert decoded.tolist() == [expected]


def test_type_table_is_ggmls() -> None:
    gguf = pytest.importorskip("gguf", reason='needs pip install "minisa[gguf]"')
    for type in ggml.TYPES.values():
        number = gguf.GGMLQuantizationType(type.code)
        assert (number.name, *gguf.GGML_QUANT_SIZES[number]) == (type.name, type.block, type.nbytes)


def with_other_type(path: Path, name: str, type: ggml.GGMLType, content: np.ndarray) -> None:
    """Rewrite a file so that one of its tensors has other blocks."""
    header, data = read_gguf(path), path.read_bytes()
    tensors = {
        info.name: (info.type.code, info.shape, data[info.offset : info.offset + info.nbytes])
        for info in header.tensors
    }
    tensors[name] = (type.code, tensors[name][1], content.tobytes())
    path.write_bytes(encode_gguf(header.metadata, tensors))


@pytest.mark.parametrize(
    ("tensor", "type", "package", "says"),
    [
        ("blk.0.attn_q.weight", "Q4_K", None, r'attn_q\.weight is Q4_K, which needs .*pip install "minisa\[gguf\]"'),
        ("output.weight", "I32", "gguf", r"output\.weight is I32, which not even"),
        ("output_norm.weight", "Q8_0", "gguf", r"output_norm\.weight is Q8_0 \[256\]: expected only matrices to be"),
    ],
)
def test_types_that_cannot_be_read(
    tensor: str, type: str, package: str | None, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if package is None:
        monkeypatch.setitem(sys.modules, "gguf", None)
    else:
        pytest.importorskip(package)
    config = tiny_config(dim=256, n_heads=4, n_kv_heads=2, head_dim=64, n_layers=1)
    path = write_gguf(tmp_path / "m.gguf", config, random_weights(config))
    (info,) = (info for info in read_gguf(path).tensors if info.name == tensor)
    with_other_type(path, tensor, TYPES[type], random_blocks(TYPES[type], math.prod(info.shape) // TYPES[type].block))
    with pytest.raises(MinisaError, match=says):
        open_checkpoint(path)


@pytest.mark.parametrize(("type", "bits"), [("Q8_0", 8), ("Q4_0", 4), ("Q4_1", 4), ("F16", 11), ("BF16", 8)])
def test_quantized_weights_come_back_rounded(type: str, bits: int, tmp_path: Path) -> None:
    """Each weight is off by a step of its quantization and no more; q and k rows are in order as well."""
    config = tiny_config(n_layers=1)
    weights = random_weights(config)
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", config, weights, type=type))
    model = empty_model(config)
    load_weights(model, checkpoint, device="cpu", dtype=torch.float32)
    for name, weight in model.state_dict().items():
        if weight.ndim == 1:
            assert torch.equal(weight, weights[name])
            continue
        block_max = weights[name].abs().unflatten(1, (-1, 32)).amax(-1, keepdim=True)
        error = (weight - weights[name]).abs().unflatten(1, (-1, 32))
        assert (error <= block_max * 2 ** (1 - bits) * 1.1).all(), name
        assert error.max() > 0


VALUES: dict[str, tuple[int, bytes, Any]] = {
    "u8": (0, struct.pack("<B", 255), 255),
    "i8": (1, struct.pack("<b", -128), -128),
    "u16": (2, struct.pack("<H", 65535), 65535),
    "i16": (3, struct.pack("<h", -32768), -32768),
    "u32": (4, struct.pack("<I", 2**32 - 1), 2**32 - 1),
    "i32": (5, struct.pack("<i", -(2**31)), -(2**31)),
    "f32": (6, struct.pack("<f", 0.5), 0.5),
    "bool": (7, b"\1", True),
    "string": (8, gguf_string("Grüße 🦙"), "Grüße 🦙"),
    "not utf-8": (8, gguf_string("\udcff\udc80"), "\udcff\udc80"),
    "u64": (10, struct.pack("<Q", 2**64 - 1), 2**64 - 1),
    "i64": (11, struct.pack("<q", -(2**63)), -(2**63)),
    "f64": (12, struct.pack("<d", 0.1), 0.1),
    "strings": (9, struct.pack("<IQ", 8, 2) + gguf_string("") + gguf_string("b"), ["", "b"]),
    "bools": (9, struct.pack("<IQ", 7, 2) + b"\0\1", [False, True]),
    "none": (9, struct.pack("<IQ", 5, 0), []),
    "nested": (
        9,
        struct.pack("<IQ", 9, 2) + struct.pack("<IQ2i", 5, 2, 1, -1) + struct.pack("<IQ", 8, 1) + gguf_string("x"),
        [[1, -1], ["x"]],
    ),
}


@pytest.mark.parametrize("version", [2, 3])
def test_metadata_of_every_type(version: int, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    pairs = b"".join(gguf_string(key) + struct.pack("<I", code) + raw for key, (code, raw, _) in VALUES.items())
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", version, 0, len(VALUES)) + pairs)
    metadata = read_gguf(path).metadata
    assert metadata == {key: value for key, (_, _, value) in VALUES.items()}
    assert metadata["bool"] is True  # not 1: `add_bos_token` is asked with `is`
    assert metadata["not utf-8"].encode("utf-8", "surrogateescape") == b"\xff\x80"


@pytest.mark.parametrize("alignment", [8, 32, 4096])
def test_layout_is_what_the_gguf_package_reads(alignment: int, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason='needs pip install "minisa[gguf]"')
    config = tiny_config(n_layers=1)
    extra = {"general.alignment": alignment, "tokenizer.ggml.tokens": [f"t{i}" for i in range(256)]}
    path = write_gguf(tmp_path / "m.gguf", config, random_weights(config), type="Q4_0", metadata=extra)
    ours, theirs = read_gguf(path), gguf.GGUFReader(path)
    assert {info.name: (info.type.name, info.offset, info.shape) for info in ours.tensors} == {
        tensor.name: (tensor.tensor_type.name, tensor.data_offset, tuple(map(int, tensor.shape))[::-1])
        for tensor in theirs.tensors
    }
    for key, value in ours.metadata.items():
        assert theirs.fields[key].contents() == value


def test_a_file_by_the_gguf_packages_writer(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason='needs pip install "minisa[gguf]"')
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_block_count(30)
    writer.add_rope_freq_base(1e5)
    writer.add_token_list(["<s>", "▁a", "é"])
    writer.add_array("scores", [0.5, -1.0])
    matrix = np.arange(24, dtype=np.float32).reshape(4, 6)
    writer.add_tensor("m", matrix)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    header = read_gguf(tmp_path / "m.gguf")
    assert header.metadata["llama.block_count"] == 30
    assert header.metadata["tokenizer.ggml.tokens"] == ["<s>", "▁a", "é"]
    assert header.metadata["scores"] == [0.5, -1.0]
    (info,) = header.tensors
    assert (info.name, info.shape, info.type.code) == ("m", (4, 6), GGML_CODES["F32"])
    raw = (tmp_path / "m.gguf").read_bytes()[info.offset : info.offset + info.nbytes]
    assert raw == matrix.tobytes()


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    return split_gguf(loadable_gguf(tmp_path / "m.gguf", tiny_config(n_layers=2)), 3)


@pytest.mark.parametrize("named", [0, 2, None], ids=["by the first", "by the last", "by the folder"])
def test_a_model_in_parts(named: int | None, parts: list[Path]) -> None:
    checkpoint = open_checkpoint(parts[0].parent if named is None else parts[named])
    model = empty_model(checkpoint.config)
    load_weights(model, checkpoint, device="cpu", dtype=torch.float32)
    expected = random_weights(tiny_config(n_layers=2))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    assert load_tokenizer(checkpoint.path).decode([72, 105]) == load_tokenizer(parts[0]).decode([72, 105])
    assert checkpoint.nbytes == sum(part.stat().st_size for part in parts)


def test_what_is_wrong_with_parts_is_said(parts: list[Path]) -> None:
    first, second, third = parts
    kept = second.read_bytes()
    second.write_bytes(third.read_bytes())
    with pytest.raises(MinisaError, match=r"the tensor '.*' stands twice"):
        open_checkpoint(first)
    second.unlink()
    with pytest.raises(MinisaError, match=r"00002-of-00003\.gguf: missing, part 2 of 3 of a split GGUF"):
        open_checkpoint(third)
    second.write_bytes(kept)
    first.rename(alone := first.with_name("renamed.gguf"))
    with pytest.raises(MinisaError, match="expected the parts' own names"):
        open_checkpoint(alone)
    with pytest.raises(MinisaError, match="No such file"):
        open_checkpoint(third)


def test_a_merged_gguf_is_whole(tmp_path: Path) -> None:
    """llama-gguf-split leaves split.count in the file it merges, as 0."""
    config = tiny_config(n_layers=1)
    file = write_gguf(tmp_path / "m.gguf", config, random_weights(config), metadata={"split.count": 0})
    assert open_checkpoint(file).unknown == ()
