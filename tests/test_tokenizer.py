"""Tokenizers: the makers' ids, round trips, streaming, and files that are not what they seem."""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from minisa.bytelevel import TEKKEN_SPLIT
from minisa.checkpoint.gguf import read_gguf
from minisa.errors import MinisaError
from minisa.tokenizer import load_tokenizer
from minisa.untrusted import read_json
from tests.encode import encode_gguf
from tests.vocabularies import (
    PACKAGE_FILES,
    REAL,
    SPECIAL,
    TEXTS,
    WIDE,
    byte_level_json,
    gguf_byte_level,
    load_real,
    sentencepiece_model,
    write_json,
)

# The ids of TEXTS, and of WIDE how many there are and the beginning of their sha256, as the makers' own code has
# them: Hugging Face's tokenizers 0.23.3 (for SmolLM2 its BPE over the GGUF file's vocabulary and merges, with SmolLM2's
# pre_tokenizer; for Yi its tokenizer.json without added tokens), sentencepiece 0.2.2 with Llama 2's tokenizer.model,
# llama-models 0.3.0, mistral-common 1.13.1.
# fmt: off
GOLDEN: dict[str, tuple[list[list[int]], int, str]] = {
    "smollm2": (
        [
            [19556, 28, 905, 17, 216, 657, 506, 216, 33, 34, 35, 36, 37, 30, 38, 15486, 46494, 37366],
            [23274, 115, 40993, 179, 120, 248, 216, 33085, 246, 181, 130, 251, 183, 240, 129, 12960, 112,
             37657, 30825, 28532, 120, 12335, 134, 27011, 30658, 16525, 44757, 37189],
            [10813, 235, 119, 321, 231, 10813, 235, 119, 321, 231, 10813, 235, 117, 321, 231, 10813, 235,
             116, 10813, 233, 138, 297, 151, 219],
            [38028, 256, 197, 1792, 2738],
            [44, 108, 306, 79, 3738, 108, 46, 9690, 9617, 99, 46, 75, 39637, 15971, 108, 85, 320, 79, 311,
             108, 21198, 99, 46],
            [190, 195, 212, 217],
            [104, 333, 33, 34, 3717, 35],
        ],
        56_167, "e7cda49506ef1101",
    ),
    "llama3": (
        [
            [9906, 11, 1917, 0, 220, 1102, 596, 220, 4513, 1774, 13, 21, 95980, 588, 53050],
            [102433, 102158, 104008, 32179, 17732, 95, 76625, 51326, 43336, 103, 85410, 100556, 101102,
             44747],
            [9468, 239, 102, 102470, 9468, 239, 102, 102470, 9468, 239, 100, 102470, 9468, 239, 99, 9468,
             237, 121, 384, 54939],
            [4815, 19827, 865, 319],
            [27, 91, 318, 5011, 91, 29, 9125, 524, 82, 31868, 65562, 35239, 91, 68, 354, 851, 91, 1822, 82,
             29],
            [188, 195, 215, 221],
            [87, 256, 220, 717, 720, 18],
        ],
        48_090, "0062792263fe71d1",
    ),
    "llama2": (
        [
            [15043, 29892, 3186, 29991, 29871, 739, 29915, 29879, 29871, 29896, 29906, 29941, 29946, 29945,
             29889, 29953, 1055, 30085, 345, 274, 28059],
            [29871, 30325, 30346, 30968, 29871, 30877, 31293, 31129, 29871, 30324, 30276, 30236, 30196,
             30286, 29871, 30714, 30436, 30424, 30296, 30694, 30580],
            [29871, 243, 162, 148, 172, 30722, 243, 162, 148, 172, 30722, 243, 162, 148, 170, 30722, 243,
             162, 148, 169, 243, 162, 146, 192, 321, 30103],
            [259, 13, 13, 259, 12, 921, 30004, 13],
            [529, 29989, 326, 29918, 2962, 29989, 29958, 5205, 829, 29879, 24566, 25580, 29962, 29966,
             29989, 29872, 327, 29918, 333, 29989, 5299, 29879, 29958],
            [29871, 3, 10, 30, 130],
            [921, 1678, 29896, 29906, 29871, 13, 29941],
        ],
        61_929, "9c1220dbf40e374e",
    ),
    "yi.json": (
        [
            [25102, 97, 1504, 99, 141, 2301, 59610, 59575, 59568, 78, 79, 80, 81, 82, 98, 83, 13901, 63685,
             613, 59260],
            [4590, 62043, 59568, 63622, 539, 486, 478, 541, 455, 485, 59568, 520, 467, 520, 450, 520, 473,
             63992, 520, 475, 59568, 529, 469, 490, 529, 469, 496, 529, 469, 473, 63879, 529, 469, 471, 529,
             470, 433],
            [545, 464, 450, 474, 63713, 545, 464, 450, 474, 63713, 545, 464, 450, 472, 63713, 545, 464, 450,
             471, 545, 464, 448, 494, 615, 509, 434],
            [59568, 144, 144, 141, 126, 1812, 143, 144],
            [59666, 59705, 622, 59593, 5858, 46826, 10707, 1359, 59575, 52025, 34448, 32113, 59705, 59569,
             618, 59593, 619, 59705, 5122, 59575, 59644],
            [305, 312, 332, 432],
            [59607, 140, 78, 79, 59568, 144, 80],
        ],
        63_110, "27a64597418e69d1",
    ),
    "mistral-v1": (
        [
            [22557, 28725, 1526, 28808, 28705, 661, 28742, 28713, 28705, 28740, 28750, 28770, 28781, 28782,
             28723, 28784, 1879, 28920, 333, 28345],
            [28705, 29142, 29119, 30321, 28705, 29282, 30779, 29433, 28705, 29295, 29166, 29075, 29005,
             29064, 28705, 29972, 29554, 29540, 29300, 30046, 29735],
            [28705, 243, 162, 148, 172, 29274, 243, 162, 148, 172, 29274, 243, 162, 148, 170, 29274, 243,
             162, 148, 169, 31007, 317, 28949],
            [259, 13, 13, 259, 12, 1318, 28801, 13],
            [523, 28766, 321, 28730, 2521, 28766, 28767, 6574, 700, 28713, 28767, 28792, 16289, 14626,
             28766, 28706, 322, 28730, 313, 28766, 3409, 28713, 28767],
            [28705, 3, 30963, 30246, 30982],
            [1318, 2287, 28740, 28750, 28705, 13, 28770],
        ],
        60_802, "6f5614b84c361b05",
    ),
    "mistral-v2": (
        [
            [23325, 29493, 2294, 29576, 29473, 1429, 29510, 29481, 29473, 29508, 29518, 29538, 29549, 29550,
             29491, 29552, 2647, 29688, 1101, 29113],
            [29473, 29910, 29887, 31089, 29473, 30050, 31547, 30201, 29473, 30063, 29934, 29843, 29773,
             29832, 29473, 30740, 30322, 30308, 30068, 30814, 30503],
            [29473, 1011, 930, 916, 940, 30042, 1011, 930, 916, 940, 30042, 1011, 930, 916, 938, 30042,
             1011, 930, 916, 937, 31775, 1085, 29717],
            [1027, 781, 781, 1027, 780, 2086, 29569, 781],
            [1291, 29534, 1089, 29498, 3289, 29534, 29535, 7342, 1468, 29481, 29535, 29560, 17057, 15394,
             29534, 29474, 1090, 29498, 1081, 29534, 4177, 29481, 29535],
            [29473, 771, 31731, 31014, 31750],
            [2086, 3055, 29508, 29518, 29473, 781, 29538],
        ],
        60_802, "8d9ecbe7796b6012",
    ),
    "mistral-v3": (
        [
            [23325, 29493, 2294, 29576, 29473, 1429, 29510, 29481, 29473, 29508, 29518, 29538, 29549, 29550,
             29491, 29552, 2647, 29688, 1101, 29113],
            [29473, 29910, 29887, 31089, 29473, 30050, 31547, 30201, 29473, 30063, 29934, 29843, 29773,
             29832, 29473, 30740, 30322, 30308, 30068, 30814, 30503],
            [29473, 1011, 930, 916, 940, 30042, 1011, 930, 916, 940, 30042, 1011, 930, 916, 938, 30042,
             1011, 930, 916, 937, 31775, 1085, 29717],
            [1027, 781, 781, 1027, 780, 2086, 29569, 781],
            [1291, 29534, 1089, 29498, 3289, 29534, 29535, 7342, 1468, 29481, 29535, 29560, 17057, 15394,
             29534, 29474, 1090, 29498, 1081, 29534, 4177, 29481, 29535],
            [29473, 771, 31731, 31014, 31750],
            [2086, 3055, 29508, 29518, 29473, 781, 29538],
        ],
        60_802, "8d9ecbe7796b6012",
    ),
    "tekken": (
        [
            [22177, 1044, 4304, 1033, 1032, 2157, 1681, 1032, 1049, 1050, 1051, 1052, 1053, 1046, 1054,
             98355, 35858],
            [10008, 15199, 38243, 2897, 5697, 118878, 109040, 2063],
            [1240, 1159, 1145, 1169, 29568, 1240, 1159, 1145, 1169, 29568, 1240, 1159, 1145, 1167, 29568,
             1240, 1159, 1145, 1166, 1240, 1159, 1143, 1189, 1324, 1204, 1129],
            [1032, 1267, 96338, 2460, 1013, 1010],
            [1060, 1124, 1329, 18993, 1124, 1062, 25708, 1885, 1115, 110391, 3174, 3074, 110501, 1124, 1101,
             1360, 3384, 1124, 4812, 1115, 1062],
            [1000, 1007, 1027, 1127],
            [1120, 1256, 1032, 1049, 1050, 1032, 1010, 1051],
        ],
        54_925, "312769ce712dfdd5",
    ),
}
GOLDEN["mistral-v7"] = GOLDEN["mistral-v3"]  # other special tokens; text is the same in mistral-common too
GOLDEN["llama3.2.json"], GOLDEN["nemo.json"] = GOLDEN["llama3"], GOLDEN["tekken"]  # in Hugging Face's tokenizers too
# fmt: on


def digest(ids: list[int]) -> str:
    return hashlib.sha256(" ".join(map(str, ids)).encode()).hexdigest()[:16]


@pytest.mark.parametrize("name", REAL)
def test_the_makers_ids(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer = load_real(name, request)
    texts, count, sha256 = GOLDEN[name]
    assert [tokenizer.encode(text) for text in TEXTS] == texts
    wide = tokenizer.encode(WIDE)
    assert (len(wide), digest(wide)) == (count, sha256)


@pytest.mark.parametrize(
    ("name", "vocab_size", "n_special", "bos_id", "eos_ids", "add_bos"),
    [
        ("smollm2", 49_152, 17, 1, {0, 2}, False),
        ("llama2", 32_000, 3, 1, {2}, True),
        ("llama3", 128_256, 256, 128_000, {128_001, 128_008, 128_009}, True),
        ("llama3.2.json", 128_256, 256, 128_000, {128_001, 128_008, 128_009}, True),
        ("yi.json", 64_000, 3, 1, {2}, False),
        ("mistral-v1", 32_000, 3, 1, {2}, True),
        ("mistral-v2", 32_768, 771, 1, {2}, True),
        ("mistral-v3", 32_768, 751, 1, {2}, True),
        ("tekken", 131_072, 1000, 1, {2}, True),
        ("nemo.json", 131_072, 1000, 1, {2}, True),
    ],
)
def test_special_tokens(
    name: str,
    vocab_size: int,
    n_special: int,
    bos_id: int,
    eos_ids: set[int],
    add_bos: bool,
    request: pytest.FixtureRequest,
) -> None:
    tokenizer = load_real(name, request)
    assert (tokenizer.vocab_size, len(tokenizer.special)) == (vocab_size, n_special)
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.add_bos) == (bos_id, eos_ids, add_bos)


@pytest.mark.parametrize(
    ("name", "token", "token_id"),
    [
        ("smollm2", "<|im_start|>", 1),
        ("llama3", "<|begin_of_text|>", 128_000),
        ("llama3", "<|finetune_right_pad_id|>", 128_004),
        ("llama3", "<|start_header_id|>", 128_006),
        ("llama3", "<|eot_id|>", 128_009),
        ("llama3", "<|python_tag|>", 128_010),
        ("llama3", "<|reserved_special_token_2|>", 128_012),
        ("llama3", "<|reserved_special_token_245|>", 128_255),
        ("llama3.2.json", "<|finetune_right_pad_id|>", 128_004),
        ("llama3.2.json", "<|python_tag|>", 128_010),
        ("mistral-v2", "[/INST]", 4),
        ("mistral-v3", "[INST]", 3),
        ("mistral-v7", "[SYSTEM_PROMPT]", 16),
        ("tekken", "[SUFFIX]", 16),
        ("tekken", "<SPECIAL_999>", 999),
        ("nemo.json", "[/INST]", 4),
    ],
)
def test_where_special_tokens_are(name: str, token: str, token_id: int, request: pytest.FixtureRequest) -> None:
    assert load_real(name, request).special[token] == token_id


def test_tekkens_pattern(request: pytest.FixtureRequest) -> None:
    """tekken.json brings its own; a GGUF file has only its name."""
    file = request.getfixturevalue("package_file")(*PACKAGE_FILES["tekken"])
    assert read_json(file)["config"]["pattern"] == TEKKEN_SPLIT


@pytest.mark.parametrize("name", REAL)
def test_text_cannot_spell_special_tokens(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer = load_real(name, request)
    spelled = set(tokenizer.encode(" ".join(tokenizer.special)) + tokenizer.encode("".join(tokenizer.special)))
    assert not spelled & set(tokenizer.special.values())


@pytest.mark.parametrize("name", REAL)
def test_special_tokens_have_no_text(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer = load_real(name, request)
    ids = [*tokenizer.special.values(), *tokenizer.encode("here"), *tokenizer.special.values()]
    assert tokenizer.decode(ids) == "here"


anything = st.text(max_size=60)
few = settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize("name", REAL)
@few
@given(text=anything)
def test_round_trip(name: str, text: str, request: pytest.FixtureRequest) -> None:
    tokenizer = load_real(name, request)
    assume("▁" not in text)  # sentencepiece cannot tell it from a space
    if name == "smollm2":  # its vocabulary lacks the bytes of some control characters and unassigned planes
        assume(
            all(tokenizer.encode(character) for character in text)
            and not any(0x40000 <= ord(c) < 0xC0000 for c in text)
        )
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode(text, mid_text=True), mid_text=True) == text


@pytest.mark.parametrize("name", REAL)
@few
@given(data=st.data())
def test_streaming_equals_decoding(name: str, data: st.DataObject, request: pytest.FixtureRequest) -> None:
    """Whatever the ids, invalid UTF-8 included, and ids that only pad the embedding."""
    tokenizer = load_real(name, request)
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 8) | st.integers(0, 600), max_size=20))
    raw = b"".join(tokenizer.token_bytes(i) for i in ids)
    for mid_text in (False, True):
        stream = tokenizer.stream(mid_text=mid_text)
        text = "".join([*map(stream.feed, ids), stream.flush()])
        strips = name.startswith(("llama2", "mistral")) and not mid_text
        assert text == (raw.removeprefix(b" ") if strips else raw).decode(errors="replace")
        assert text == tokenizer.decode(ids, mid_text=mid_text)


@pytest.mark.parametrize("name", ["mistral-v1", "tekken"])
def test_a_continuation_keeps_its_space(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer = load_real(name, request)
    ids = tokenizer.encode("The capital of France is Paris.")
    for n in range(1, len(ids)):
        assert tokenizer.decode(ids[:n]) + tokenizer.decode(ids[n:], mid_text=True) == "The capital of France is Paris."
    assert tokenizer.decode(tokenizer.encode("Paris")) == "Paris"


def test_half_a_character_is_held_back(request: pytest.FixtureRequest) -> None:
    tokenizer = load_real("llama3", request)
    ids = tokenizer.encode("👩‍👧 ok")
    stream = tokenizer.stream()
    texts = [stream.feed(i) for i in ids]
    assert texts[:3] == ["", "", "👩"]
    assert "".join(texts) + stream.flush() == "👩‍👧 ok"
    cut = tokenizer.stream()
    assert [cut.feed(ids[0]), cut.feed(ids[1]), cut.flush()] == ["", "", "\ufffd"]


@functools.cache
def hugging_face_smollm2(path: Path) -> Callable[[str], list[int]]:
    tokenizers = pytest.importorskip("tokenizers")
    metadata = read_gguf(path).metadata
    vocab = {token: i for i, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    peer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges))
    steps = tokenizers.pre_tokenizers
    peer.pre_tokenizer = steps.Sequence([steps.Digits(individual_digits=True), steps.ByteLevel(add_prefix_space=False)])
    return lambda text: peer.encode(text, add_special_tokens=False).ids


@few
@given(text=anything)
def test_smollm2_as_hugging_face_has_it(text: str, request: pytest.FixtureRequest) -> None:
    """Its vocabulary lacks 21 bytes; what becomes of text with those is as at the makers', too."""
    expected = hugging_face_smollm2(request.getfixturevalue("smollm2_path"))
    assert load_real("smollm2", request).encode(text) == expected(text)


def test_which_file_of_a_directory(tmp_path: Path) -> None:
    """The maker's own format before Hugging Face's copy; Llama 3's repositories have theirs in original/."""
    with pytest.raises(MinisaError, match="no tokenizer in this directory: expected"):
        load_tokenizer(tmp_path)
    (tmp_path / "original").mkdir()
    (tmp_path / "original" / "tokenizer.model").write_bytes(sentencepiece_model(vocab_size=320))
    assert load_tokenizer(tmp_path).vocab_size == 320
    raw = byte_level_json()
    write_json(tmp_path / "tokenizer.json", raw)
    assert load_tokenizer(tmp_path).vocab_size == len(raw["model"]["vocab"]) + len(SPECIAL)
    (tmp_path / "tokenizer.model.v2").write_bytes(sentencepiece_model(vocab_size=310))
    (tmp_path / "tokenizer.model.v3").write_bytes(sentencepiece_model(vocab_size=315))
    assert load_tokenizer(tmp_path).vocab_size == 315
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model())
    assert load_tokenizer(tmp_path).vocab_size == 330


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("tokenizer.model", b"", "the file is empty"),
        ("tokenizer.model", sentencepiece_model()[:-100], "damaged"),
        ("tokenizer.model", b"\x00" * 1000, "damaged"),
        ("tokenizer.model", b"IQ== 0\nIg== 1\n", "2 lines of tokens: expected Llama 3's 128000"),
        ("tokenizer.model", b"IQ== 0\nIg==\n", "damaged"),
        ("tokenizer.json", b"", "not valid JSON"),
        ("tokenizer.json", b"[1]", "expected an object"),
        ("tokenizer.json", b'{"model": ', "not valid JSON"),
        ("tokenizer.json", b'{"model": {}}', "damaged"),
        ("tokenizer.json", b"\xff\xfe{}", "not valid JSON"),
        ("tekken.json", b"{}", "damaged"),
        ("model.gguf", b"GGUF", "model.gguf"),
        ("model.gguf", b"PK\x03\x04", "not a GGUF file"),
    ],
)
def test_damaged_files(name: str, content: bytes, says: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(MinisaError) as error:
        load_tokenizer(file)
    assert says in str(error.value)
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_gguf_file_by_another_name(tmp_path: Path) -> None:
    """As a store of blobs has it, or with a suffix in capitals."""
    for name in ("sha256-0123", "MODEL.GGUF"):
        file = tmp_path / name
        file.write_bytes(encode_gguf(gguf_byte_level(byte_level_json()), {}))
        assert load_tokenizer(file).encode("hello") != []


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(
        MinisaError, match=r"tokenizer\.model: No such file or directory: expected tokenizer\.model, tekken"
    ):
        load_tokenizer(tmp_path / "tokenizer.model")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("tokenizer_config.json", "{", "tokenizer_config.json is not valid JSON"),
        ("tokenizer_config.json", '{"added_tokens_decoder": 5}', "damaged"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {}}}', "damaged"),
        ("tokenizer_config.json", '{"chat_template": [1]}', "damaged"),
        ("tokenizer_config.json", '{"chat_template": 1}', "chat_template is 1: expected a string"),
        ("added_tokens.json", '{"<x>": -1}', "a token's id is -1"),
        ("added_tokens.json", '{"<x>": 1e3}', "a token's id is 1000.0"),
        ("generation_config.json", '{"eos_token_id": [400]}', "bos_token_id or eos_token_id is 400: expected 0 to 329"),
        ("config.json", '{"eos_token_id": "2"}', "bos_token_id or eos_token_id is '2'"),
    ],
)
def test_damaged_settings(name: str, content: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model())
    load_tokenizer(tmp_path)
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(MinisaError, match=re.escape(says)) as error:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_text_that_is_not_unicode(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model())
    for file in (tmp_path / "tokenizer.model", write_json(tmp_path / "tokenizer.json", byte_level_json())):
        with pytest.raises(MinisaError, match="character 2 of the text is half a surrogate pair"):
            load_tokenizer(file).encode("ab\ud800")
