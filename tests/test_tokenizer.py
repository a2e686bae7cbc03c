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

from minisa.checkpoint.gguf import read_gguf
from minisa.errors import MinisaError
from minisa.files import read_json
from minisa.text.bytelevel import TEKKEN_SPLIT
from minisa.text.chat import find_template
from minisa.text.tokenizer import load_tokenizer
from tests.encode import encode_gguf
from tests.makers_ids import TEXT_IDS
from tests.vocabularies import (
    METASPACE,
    PACKAGE_FILES,
    REAL,
    SPECIAL,
    TEXTS,
    WIDE,
    byte_level_json,
    gguf_byte_level,
    load_real,
    sentencepiece_json,
    sentencepiece_model,
    write_json,
)


def digest(ids: list[int]) -> str:
    return hashlib.sha256(" ".join(map(str, ids)).encode()).hexdigest()[:16]


@pytest.mark.parametrize("name", REAL)
def test_the_makers_ids(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer = load_real(name, request)
    texts, count, sha256 = TEXT_IDS[name]
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


def test_a_checkpoint_without_a_tokenizer(tmp_path: Path) -> None:
    """It takes and gives token ids, with the ends that config.json states; of text it says what is missing."""
    write_json(tmp_path / "config.json", {"eos_token_id": [7, 8]})
    without = load_tokenizer(tmp_path)
    assert (without.eos_ids, without.bos_ids, without.special) == ({7, 8}, [], {})
    stream = without.stream()
    assert [stream.feed(5), stream.flush()] == ["", ""]
    for use in (without.encode, without.decode, lambda _: find_template(tmp_path, without)):
        with pytest.raises(MinisaError, match=rf"{tmp_path}: no tokenizer, .* tokenizer\.model, tekken\.json, tok"):
            use([{"role": "user", "content": "Hi"}])  # type: ignore[operator]
    file = tmp_path / "model.gguf"
    file.write_bytes(encode_gguf({"general.architecture": "llama"}, {}))
    assert load_tokenizer(file).special == {}


@pytest.mark.parametrize("scheme", ["first", "always"])
def test_spaces_behind_special_tokens(scheme: str, tmp_path: Path) -> None:
    """As Hugging Face's tokenizers put them; the makers' own code puts one before every text."""
    tokenizers = pytest.importorskip("tokenizers")
    raw = sentencepiece_json(
        sentencepiece_model(), normalizer=None, pre_tokenizer=METASPACE | {"prepend_scheme": scheme}
    )
    file = write_json(tmp_path / "tokenizer.json", raw)
    ours, theirs = load_tokenizer(file), tokenizers.Tokenizer.from_file(str(file))
    for text in ("<s>the cat</s>sat", "the<s></s>\nmat[INST]x"):
        assert ours.encode_with_special(text) == theirs.encode(text, add_special_tokens=False).ids
    plain = [ours.encode(text) for text in ("the", "cat")]
    assert ours.encode_with_special("the</s>cat", makers_spaces=True) == [*plain[0], 2, *plain[1]]
    write_json(tmp_path / "tokenizer_config.json", {"legacy": scheme == "always"})
    assert load_tokenizer(tmp_path).encode_with_special("<s>the") == ours.encode_with_special("<s>the")


def test_where_a_chat_template_is_found(tmp_path: Path) -> None:
    """The .jinja file before the two .json files; of several the one named default."""
    named = [{"name": name, "template": f"the {name} one"} for name in ("tool_use", "default")]
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model())
    assert load_tokenizer(tmp_path).chat_template is None
    write_json(tmp_path / "tokenizer_config.json", {"chat_template": named})
    assert load_tokenizer(tmp_path).chat_template == "the default one"
    write_json(tmp_path / "chat_template.json", {"chat_template": "a file's"})
    assert load_tokenizer(tmp_path).chat_template == "a file's"
    (tmp_path / "chat_template.jinja").write_text("newer", encoding="utf-8")
    assert load_tokenizer(tmp_path).chat_template == "newer"


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
