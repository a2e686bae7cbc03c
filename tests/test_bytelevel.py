"""Byte-level BPE out of tokenizer.json, GGUF files and tekken.json: how text is split, and what is refused."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from minisa.errors import MinisaError
from minisa.text.bytelevel import LLAMA3_SPLIT, TEKKEN_SPLIT
from minisa.text.chat import find_template
from minisa.text.tokenizer import Tokenizer, load_tokenizer
from tests.encode import encode_gguf
from tests.vocabularies import (
    BYTE_LEVEL,
    LLAMA3,
    MARK,
    SMOLLM2,
    SPECIAL,
    TEXT,
    byte_level_json,
    gguf_byte_level,
    gpt2_letters,
    pieces,
    puts_before,
    tekken_json,
    write_json,
)


@pytest.fixture
def byte_level(tmp_path: Path) -> Tokenizer:
    return load_tokenizer(write_json(tmp_path / "tokenizer.json", byte_level_json()))


@pytest.mark.parametrize(
    ("pre_tokenizer", "expected"),
    [
        (BYTE_LEVEL, ["a", "  ", " ", " ", "12", "3", "\n", "\n", "!!", " hello"]),
        (SMOLLM2, ["a", "    ", "1", "2", "3", "\n", "\n", "!!", " hello"]),
        (LLAMA3, ["a", "  ", " ", " ", "12", "3", "\n\n", "!!", " hello"]),
    ],
    ids=["GPT-2", "SmolLM2", "Llama 3"],
)
def test_how_text_is_split(pre_tokenizer: Any, expected: list[str], tmp_path: Path) -> None:
    """SmolLM2 cuts digits out first, so spaces before one are a piece; GPT-2 and Llama 3 leave the last space over."""
    raw = byte_level_json(pre_tokenizer=pre_tokenizer)
    tokenizer = load_tokenizer(write_json(tmp_path / "tokenizer.json", raw))
    assert "".join(pieces(tokenizer, "a    123\n\n!! hello")) == "a    123\n\n!! hello"
    assert pieces(tokenizer, "a    123\n\n!! hello") == expected


@pytest.mark.parametrize(
    ("pre", "pre_tokenizer", "add_bos"),
    [
        ("smollm", SMOLLM2, False),
        ("gpt-2", BYTE_LEVEL, False),
        ("llama-bpe", LLAMA3, True),
        ("tekken", json.loads(json.dumps(LLAMA3).replace(json.dumps(LLAMA3_SPLIT), json.dumps(TEKKEN_SPLIT))), True),
    ],
)
def test_gguf_and_json_agree(pre: str, pre_tokenizer: Any, add_bos: bool, tmp_path: Path) -> None:
    raw = byte_level_json(pre_tokenizer=pre_tokenizer)
    metadata = gguf_byte_level(raw, pre)
    file = tmp_path / "model.gguf"
    file.write_bytes(encode_gguf(metadata, {}))
    tokenizer = load_tokenizer(tmp_path)
    special = tokenizer.special
    assert (tokenizer.bos_id, tokenizer.add_bos) == (special["<|endoftext|>"], add_bos)
    expected = load_tokenizer(write_json(tmp_path / "tokenizer.json", raw))
    assert special == expected.special
    text = " ".join(map(chr, range(0x3100))) + " hello hello!!  aaaa 12\n\nx aB Ab's\n/ 123/"
    assert tokenizer.encode(text) == expected.encode(text)


def test_what_gguf_says_of_bos_and_eos(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    metadata = gguf_byte_level(byte_level_json())
    special = [token_id for token_id, kind in enumerate(metadata["tokenizer.ggml.token_type"]) if kind == 3]
    metadata["tokenizer.ggml.token_type"][special[0]] = 4
    more = {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.eot_token_id": 5, "tokenizer.ggml.eom_token_id": 6}
    file.write_bytes(encode_gguf(metadata | more, {}))
    tokenizer = load_tokenizer(file)
    names = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>")
    assert tokenizer.add_bos
    assert tokenizer.eos_ids == {5, 6, *(tokenizer.special[name] for name in names)}
    assert tokenizer.decode([special[1], special[0]]) == "<|im_start|>"  # defined by a user: it shows


@pytest.mark.parametrize("ignore_merges", [True, False])
def test_a_token_that_merging_does_not_make(ignore_merges: bool, tmp_path: Path) -> None:
    """abcd becomes a, bc, d; where ignore_merges says so, a piece of text that is just that token is left whole."""
    tokens = [*gpt2_letters(), "bc", "ab", "cd", "abcd", "xyz"]
    raw = byte_level_json(pre_tokenizer=LLAMA3, merges=["b c", "a b", ["c", "d"], "ab cd"], added_tokens=[])
    raw["model"] |= {"vocab": {token: i for i, token in enumerate(tokens)}, "ignore_merges": ignore_merges}
    tokenizer = load_tokenizer(write_json(tmp_path / "tokenizer.json", raw))
    assert pieces(tokenizer, " abcd xyz") == [" ", "a", "bc", "d", " ", "x", "y", "z"]
    assert pieces(tokenizer, "abcd") == (["abcd"] if ignore_merges else ["a", "bc", "d"])


def test_bytes_that_a_vocabulary_lacks_are_left_out(tmp_path: Path) -> None:
    raw = byte_level_json()
    vocab = raw["model"]["vocab"]
    vocab["<unk>"] = vocab.pop("Ą")  # U+0104, GPT-2's letter for the byte 4
    tokenizer = load_tokenizer(write_json(tmp_path / "tokenizer.json", raw))
    assert tokenizer.decode(tokenizer.encode("a\x04b!\x04!")) == "ab!!"
    assert tokenizer.encode("!\x04!") == tokenizer.encode("!!")  # as Hugging Face's, which merges what is left
    raw["model"]["unk_token"] = "<unk>"  # which would stand for them
    with pytest.raises(MinisaError, match="its unk_token is '<unk>'"):
        load_tokenizer(write_json(tmp_path / "tokenizer.json", raw))


def test_an_added_token_that_is_not_special_shows(tmp_path: Path) -> None:
    raw = byte_level_json()
    raw["added_tokens"][0]["special"] = False
    tokenizer = load_tokenizer(write_json(tmp_path / "tokenizer.json", raw))
    shown, hidden = (tokenizer.special[name] for name in SPECIAL[:2])
    assert tokenizer.decode([shown, hidden]) == SPECIAL[0]
    assert shown not in tokenizer.encode(SPECIAL[0])


@pytest.mark.parametrize("character", ["a", " ", "\n", "1", "!", "é"])
def test_a_megabyte_in_one_piece(byte_level: Tokenizer, character: str) -> None:
    """tiktoken before 0.13 needs minutes for it, and its own splitter panics at a million spaces."""
    text = character * 1_000_000 + "x"
    began = time.perf_counter()
    ids = byte_level.encode(text)
    assert time.perf_counter() - began < 20
    assert byte_level.decode(ids) == text


@pytest.mark.parametrize("add_bos_token", [None, True, False])
def test_bos_is_what_the_post_processor_puts_before_a_text(add_bos_token: bool | None, tmp_path: Path) -> None:
    """tokenizer_config.json has no say in it, at Hugging Face's."""
    special = write_and_load(tmp_path, {"add_bos_token": add_bos_token}).special
    assert write_and_load(tmp_path, {"bos_token": "<s>", "add_bos_token": add_bos_token}).bos_ids == []
    puts = puts_before([special["<|endoftext|>"]])
    for config in ({}, {"bos_token": None}, {"bos_token": "<|endoftext|>"}):
        found = write_and_load(tmp_path, config | {"add_bos_token": add_bos_token}, post_processor=puts)
        assert found.bos_ids == [special["<|endoftext|>"]]
    with pytest.raises(MinisaError, match=r"tokenizer_config\.json: bos_token is 274, and .* puts 270 before"):
        write_and_load(tmp_path, {"bos_token": "<s>"}, post_processor=puts)


def write_and_load(folder: Path, config: dict[str, Any], **changes: Any) -> Tokenizer:
    write_json(folder / "tokenizer_config.json", config)
    return load_tokenizer(write_json(folder / "tokenizer.json", byte_level_json(**changes)))


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"type": "Unigram"}, "put the model's tokenizer.model beside it"),
    ({"continuing_subword_prefix": "##"}, "continuing_subword_prefix is '##'"),
    ({"end_of_word_suffix": "</w>"}, "end_of_word_suffix is '</w>'"),
    ({"dropout": 0.1}, "dropout is 0.1"),
    ({"normalizer": {"type": "NFC"}}, "are NFC + Digits + ByteLevel + ByteLevel: expected no normalizer"),
    ({"decoder": None}, "are None + Digits + ByteLevel + None"),
    ({"pre_tokenizer": None}, "are None + None + ByteLevel"),
    ({"pre_tokenizer": {"type": "Whitespace"}}, "are None + Whitespace + ByteLevel"),
    ({"pre_tokenizer": BYTE_LEVEL | {"add_prefix_space": True}}, "are None + ByteLevel + ByteLevel"),
    ({"pre_tokenizer": {"pretokenizers": [BYTE_LEVEL, BYTE_LEVEL]}}, "are None + ByteLevel + ByteLevel + ByteLevel"),
    ({"pre_tokenizer": json.loads(json.dumps(LLAMA3).replace("1,3", "1,2"))}, "are None + Split + ByteLevel"),
    ({"post_processor": {"type": "TemplateProcessing", "single": [TEXT, MARK]}}, "its post_processor adds more"),
    ({"post_processor": puts_before([274, 274])}, "adds more to a text"),
    ({"post_processor": {"processors": [puts_before([274]), puts_before([274])]}}, "adds more to a text"),
    ({"post_processor": {"type": "RobertaProcessing", "sep": ["<s>", 274], "cls": ["<s>", 274]}}, "adds more to a"),
    ({"merges": ["a b"]}, "the merges make b'ab', which is not in the vocabulary"),
    ({"merges": ["h e", "l"]}, "damaged"),
    ({"vocab": []}, "damaged"),
    ({"vocab": {"a" * 6000: 0}}, "too long to merge"),
    ({"added_tokens": [{"id": 700, "content": "<s>", "special": True}]}, "ids are not 0 to 268, each once"),
    ({"added_tokens": [{"id": 3, "content": "<s>", "special": True}]}, "each once"),
    ({"added_tokens": [{"id": -1, "content": "<s>", "special": True}]}, "each once"),
    ({"added_tokens": [{"id": "268", "content": "<s>", "special": True}]}, "damaged"),
    ({"added_tokens": [{"id": 268, "content": "안녕", "special": False}]}, "the added token '안녕' is plain text"),
]


@pytest.mark.parametrize(("changes", "says"), REFUSED)
def test_tokenizer_json_that_is_refused(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    refused(write_json(tmp_path / "tokenizer.json", byte_level_json(**changes)), says)


def refused(file: Path, says: str) -> None:
    with pytest.raises(MinisaError) as error:
        load_tokenizer(file)
    assert says in str(error.value)
    assert str(error.value).startswith(f"{file}: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model": "bert"}, "tokenizer.ggml.model is 'bert'"),
        ({"pre": "qwen2"}, "tokenizer.ggml.pre is 'qwen2': expected one of llama-bpe"),
        ({"pre": None}, "tokenizer.ggml.pre is 'missing'"),
        ({"merges": None}, "damaged"),
        ({"merges": ["he"]}, "damaged"),
        ({"merges": [1, 2]}, "damaged"),
        ({"tokens": ["a", "b"]}, "damaged"),
        ({"tokens": ["a"] * 275, "merges": []}, "each once"),
        ({"token_type": None}, "damaged"),
        ({"eos_token_id": 70_000}, "bos_token_id or eos_token_id is 70000"),
        ({"bos_token_id": "one"}, "bos_token_id or eos_token_id is 'one'"),
    ],
)
def test_gguf_that_is_refused(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    metadata = gguf_byte_level(byte_level_json()) | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    file = tmp_path / "model.gguf"
    file.write_bytes(encode_gguf({key: value for key, value in metadata.items() if value is not None}, {}))
    refused(file, says)


def test_tekken_cuts_its_vocabulary_and_fills_up_its_special_tokens(tmp_path: Path) -> None:
    raw = tekken_json()
    tokenizer = load_tokenizer(write_json(tmp_path / "tekken.json", raw))
    assert tokenizer.vocab_size == 287  # without ll
    assert pieces(tokenizer, "hell") == ["he", "l", "l"]
    assert tokenizer.encode("he") == [286]
    assert (tokenizer.special["[INST]"], tokenizer.special["<SPECIAL_29>"], len(tokenizer.special)) == (3, 29, 30)
    raw["special_tokens"] = [{"rank": 0, "token_str": "<unk>"}, {"rank": 1, "token_str": "<s>"}]
    tokenizer = load_tokenizer(write_json(tmp_path / "tekken.json", raw))
    assert (tokenizer.bos_id, tokenizer.special["<SPECIAL_2>"], len(tokenizer.special)) == (1, 2, 30)


@pytest.mark.parametrize(("version", "name"), [("v3", "<SPECIAL_17>"), ("v7", "[SYSTEM_PROMPT]")])
def test_what_a_tekken_file_means_that_lists_no_special_tokens(version: str, name: str, tmp_path: Path) -> None:
    """The version tells the chat format too, where a maker's own download has no template."""
    raw = tekken_json()
    raw["config"]["version"] = version
    (tmp_path / "params.json").write_text("{}", encoding="utf-8")
    tokenizer = load_tokenizer(write_json(tmp_path / "tekken.json", raw))
    assert tokenizer.special[name] == 17
    assert find_template(tmp_path, tokenizer).name == f"mistral-{version}"


def test_names_that_a_tekken_file_does_not_give_are_given_beside_it(tmp_path: Path) -> None:
    """Nemo's tekken.json lists no special tokens, and its tokenizer_config.json has its <pad> elsewhere than others."""
    raw = tekken_json()
    raw["config"]["version"] = "v3"
    write_json(tmp_path / "tekken.json", raw)
    names = ["[TOOL_CALLS]", "<pad>", "[PREFIX]", "[MIDDLE]", "[SUFFIX]"]
    decoder = {str(9 + n): {"content": name, "special": True} for n, name in enumerate(names)}
    write_json(tmp_path / "tokenizer_config.json", {"added_tokens_decoder": decoder})
    special = load_tokenizer(tmp_path).special
    assert [special[name] for name in names] == [9, 10, 11, 12, 13]
    assert special["[INST]"] == 3
    assert sorted(special.values()) == list(range(30))
    write_json(tmp_path / "added_tokens.json", {"[IMG]": 10})
    with pytest.raises(MinisaError, match=r"two added tokens, .*, have the id 10"):
        load_tokenizer(tmp_path)
    (tmp_path / "added_tokens.json").unlink()
    raw["special_tokens"] = [{"rank": 11, "token_str": "<pad>"}]
    write_json(tmp_path / "tekken.json", raw)
    with pytest.raises(MinisaError, match="the added token '<pad>' has the id 10, and 11 in the vocabulary"):
        load_tokenizer(tmp_path)


def test_tekken_v15_which_has_settings_in_its_prompts(tmp_path: Path) -> None:
    raw = tekken_json()
    raw["special_tokens"] = [
        {"rank": n, "token_str": name} for n, name in enumerate(("<s>", "[INST]", "[MODEL_SETTINGS]"))
    ]
    (tmp_path / "params.json").write_text("{}", encoding="utf-8")
    with pytest.raises(MinisaError, match=r"a chat format with \[MODEL_SETTINGS\] is not known"):
        find_template(tmp_path, load_tokenizer(write_json(tmp_path / "tekken.json", raw)))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"default_num_special_tokens": 1 << 60},
            "default_num_special_tokens is 1152921504606846976: expected at most",
        ),
        ({"default_num_special_tokens": 3}, "each once"),  # [INST] would be 3, as the first byte
        ({"pattern": r"(?:a+)+$|."}, "is not Mistral's"),
        ({"pattern": 5}, "is not Mistral's"),
        ({"default_vocab_size": None}, "damaged"),
    ],
)
def test_tekken_that_is_refused(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    raw = tekken_json()
    raw["config"] |= changes
    refused(write_json(tmp_path / "tekken.json", raw), says)
