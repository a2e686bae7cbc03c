"""Tokens that a fine-tuner added in the files beside a vocabulary."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from minisa.errors import MinisaError
from minisa.text.spm import proto_field
from minisa.text.tokenizer import load_tokenizer
from tests.vocabularies import sentencepiece_model, write_json

MODEL = sentencepiece_model()


@pytest.fixture
def sentencepiece_file(tmp_path: Path) -> Path:
    file = tmp_path / "tokenizer.model"
    file.write_bytes(MODEL)
    return file


@pytest.mark.parametrize(
    ("token_id", "name", "special", "says"),
    [
        ("40", "<think>", False, "the added token '<think>' has the id 40, which is that of b"),
        ("40", "<think>", True, "has the id 40"),
        ("400", "</s>", True, "the added token '</s>' has the id 400, and 2 in the vocabulary"),
        ("331", "<think>", True, "the added tokens' ids leave gaps or repeat: expected 330 and those that follow"),
        ("400", "안녕", False, "the added token '안녕' is plain text"),
        ("400", "    ", False, "is plain text"),
    ],
)
def test_added_tokens_that_are_refused(
    token_id: str, name: str, special: bool, says: str, sentencepiece_file: Path, tmp_path: Path
) -> None:
    decoder = {token_id: {"content": name, "special": special}}
    write_json(tmp_path / "tokenizer_config.json", {"added_tokens_decoder": decoder})
    with pytest.raises(MinisaError, match=re.escape(says)):
        load_tokenizer(sentencepiece_file)


def test_a_special_token_that_text_could_spell(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model(user_defined_symbols=["<|im_start|>"]))
    tokenizer = load_tokenizer(tmp_path)
    token_id = tokenizer.encode("<|im_start|>")[-1]
    assert "<|im_start|>" not in tokenizer.special
    added = {"added_tokens_decoder": {str(token_id): {"content": "<|im_start|>", "special": True}}}
    write_json(tmp_path / "tokenizer_config.json", added)
    with pytest.raises(MinisaError, match=re.escape("plain text can spell the special token '<|im_start|>'")):
        load_tokenizer(tmp_path)


def test_tokens_that_a_fine_tuner_added(sentencepiece_file: Path, tmp_path: Path) -> None:
    write_json(tmp_path / "added_tokens.json", {"<|im_end|>": 330, "<|im_start|>": 331})
    write_json(
        tmp_path / "tokenizer_config.json",
        {
            "added_tokens_decoder": {
                "1": {"content": "<s>", "special": True},
                "331": {"content": "<|im_start|>", "special": True},
                "332": {"content": "<think>", "special": False},
            },
            "bos_token": {"content": "<s>"},
            "eos_token": "<|im_end|>",
            "add_bos_token": False,
        },
    )
    write_json(tmp_path / "generation_config.json", {"eos_token_id": [2, 3]})
    write_json(tmp_path / "config.json", {"eos_token_id": 4})
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.vocab_size == 333
    assert (tokenizer.bos_id, tokenizer.add_bos) == (1, False)
    assert tokenizer.eos_ids == {2, 3, 4, 330}
    assert tokenizer.decode([331, *tokenizer.encode("hello"), 332, 330]) == "hello<think>"
    assert not {330, 331, 332} & set(tokenizer.encode("<|im_start|><|im_end|><think>"))


def test_markers_that_are_pieces_already(sentencepiece_file: Path, tmp_path: Path) -> None:
    """Code Llama's for filling in: normal pieces that no merges lead to, and special tokens to Hugging Face."""
    names = ["▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>"]
    plain = load_tokenizer(sentencepiece_file)
    markers = b"".join(proto_field(1, proto_field(1, name.encode()) + proto_field(2, -1000.0)) for name in names)
    sentencepiece_file.write_bytes(MODEL + markers)
    ids = {name: plain.vocab_size + n for n, name in enumerate(names)}
    decoder = {str(token_id): {"content": name, "special": True} for name, token_id in ids.items()}
    write_json(tmp_path / "tokenizer_config.json", {"added_tokens_decoder": decoder})
    tokenizer = load_tokenizer(sentencepiece_file)
    assert tokenizer.special == plain.special | ids
    text = "def <PRE> ▁<PRE> <MID>"
    assert tokenizer.encode(text) == plain.encode(text)
    assert tokenizer.decode([*ids.values(), *tokenizer.encode("hello")]) == "hello"
