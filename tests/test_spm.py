"""Sentencepiece vocabularies: the space before a text, and GGUF's and tokenizer.json's copies of them."""

from __future__ import annotations

import json
import random
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from minisa.errors import MinisaError
from minisa.text.tokenizer import Tokenizer, load_tokenizer
from tests.encode import encode_gguf
from tests.vocabularies import (
    METASPACE,
    PACKAGE_FILES,
    TEXTS,
    WIDE,
    gguf_sentencepiece,
    load_real,
    pieces,
    sentencepiece_json,
    sentencepiece_model,
    write_json,
)

MODEL = sentencepiece_model()


@pytest.fixture
def sentencepiece_file(tmp_path: Path) -> Path:
    file = tmp_path / "tokenizer.model"
    file.write_bytes(MODEL)
    return file


def load_gguf(folder: Path, metadata: dict[str, Any]) -> Tokenizer:
    file = folder / "model.gguf"
    file.write_bytes(encode_gguf(metadata, {}))
    return load_tokenizer(file)


def agree(tokenizer: Tokenizer, expected: Tokenizer) -> None:
    assert tokenizer.special == expected.special
    for text in (*TEXTS, "the quick brown fox,  jumps\tover\n\nit 123", "[INST] </s>", "aaaaaaa", " the  cat", " \x00"):
        assert tokenizer.encode(text) == expected.encode(text)
        assert tokenizer.encode(text, mid_text=True) == expected.encode(text, mid_text=True)
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_space_before_a_text(sentencepiece_file: Path) -> None:
    tokenizer = load_tokenizer(sentencepiece_file)
    assert pieces(tokenizer, "the cat") == [" the", " cat"]
    assert tokenizer.encode(" the cat", mid_text=True) == tokenizer.encode("the cat")
    assert tokenizer.token_bytes(tokenizer.encode("the cat", mid_text=True)[0])[:1] != b" "
    assert tokenizer.decode(tokenizer.encode("  the")) == "  the"


def test_no_space_before_a_text(sentencepiece_file: Path, tmp_path: Path) -> None:
    by_gguf = load_gguf(tmp_path, gguf_sentencepiece(MODEL) | {"tokenizer.ggml.add_space_prefix": False})
    write_json(tmp_path / "tokenizer_config.json", {"add_prefix_space": False})
    for tokenizer in (by_gguf, load_tokenizer(sentencepiece_file)):
        assert tokenizer.encode("the cat") == tokenizer.encode("the cat", mid_text=True)
        assert pieces(tokenizer, "the cat") != [" the", " cat"]
        assert tokenizer.decode(tokenizer.encode(" the cat")) == " the cat"


def test_gguf_and_tokenizer_model_agree(sentencepiece_file: Path, tmp_path: Path) -> None:
    tokenizer = load_gguf(tmp_path, gguf_sentencepiece(MODEL))
    agree(tokenizer, load_tokenizer(sentencepiece_file))
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (1, {2})


def test_a_marker_that_a_user_defined_in_gguf_is_special(tmp_path: Path) -> None:
    """sentencepiece would find it in plain text; converters mark <|im_start|> so."""
    metadata = gguf_sentencepiece(MODEL)
    for key, value in (("tokens", "<|im_start|>"), ("scores", 0.0), ("token_type", 4)):
        metadata[f"tokenizer.ggml.{key}"].append(value)
    tokenizer = load_gguf(tmp_path, metadata)
    assert tokenizer.special["<|im_start|>"] == tokenizer.vocab_size - 1
    assert tokenizer.special["<|im_start|>"] not in tokenizer.encode("<|im_start|>")


def test_words_and_spaces_that_a_user_defined_are_found_in_text(sentencepiece_file: Path, tmp_path: Path) -> None:
    """As by sentencepiece itself, whose piece GGUF spells with a space."""
    words = ["▁▁▁▁", "quick"]
    sentencepiece_file.write_bytes(sentencepiece_model(user_defined_symbols=words))
    metadata = gguf_sentencepiece(sentencepiece_file.read_bytes())
    for word in words:
        place = metadata["tokenizer.ggml.tokens"].index(word)
        metadata["tokenizer.ggml.tokens"][place] = word.replace("▁", " ")
        metadata["tokenizer.ggml.token_type"][place] = 4
    tokenizer = load_gguf(tmp_path, metadata)
    agree(tokenizer, load_tokenizer(sentencepiece_file))
    assert pieces(tokenizer, "the quick    fox")[2:4] == ["quick", "    "]


def test_a_gguf_file_without_scores(tmp_path: Path) -> None:
    """What llama.cpp's converter writes where it finds only a tokenizer.json; merging by them goes left to right."""
    metadata = gguf_sentencepiece(MODEL)
    metadata["tokenizer.ggml.scores"] = [-1000.0] * len(metadata["tokenizer.ggml.scores"])
    with pytest.raises(MinisaError, match=r"tokenizer\.ggml\.scores are all alike"):
        load_gguf(tmp_path, metadata)


PIECES: dict[str, int] = sentencepiece_json(MODEL)["model"]["vocab"]


class TestTokenizerJSON:
    """What fine-tuners save where they leave out the tokenizer.model."""

    @pytest.mark.parametrize("newer", [{}, {"normalizer": None, "pre_tokenizer": METASPACE, "unk_token": None}])
    def test_it_agrees_with_its_tokenizer_model(
        self, newer: dict[str, Any], sentencepiece_file: Path, tmp_path: Path
    ) -> None:
        expected = load_tokenizer(sentencepiece_file)
        tokenizer = self.load(tmp_path, **newer)
        agree(tokenizer, expected)
        assert (tokenizer.bos_ids, tokenizer.eos_ids) == ([1], {2})

    @pytest.mark.parametrize("name", ["mistral-v1", "mistral-v3"])
    def test_a_makers_own(self, name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
        model = request.getfixturevalue("package_file")(*PACKAGE_FILES[name]).read_bytes()
        tokenizer = load_tokenizer(write_json(tmp_path / "tokenizer.json", sentencepiece_json(model)))
        expected = load_real(name, request)
        agree(tokenizer, expected)
        assert tokenizer.encode(WIDE) == expected.encode(WIDE)

    @settings(deadline=None, max_examples=50)
    @given(text=st.text("helo wtac\n▁日", max_size=30), seed=st.integers(0, 20))
    def test_as_hugging_face_has_it(self, text: str, seed: int) -> None:
        """Whatever the order of the pieces; but for a space at the beginning, before which newer files put no other."""
        tokenizers = pytest.importorskip("tokenizers")
        raw = sentencepiece_json(MODEL, normalizer=None, pre_tokenizer=METASPACE)
        pieces = sorted({left + right for left, right in raw["model"]["merges"]})
        random.Random(seed).shuffle(pieces)
        raw["model"]["merges"].sort(key=lambda pair: pieces.index("".join(pair)))
        assume(not text.startswith((" ", "▁")))
        with tempfile.TemporaryDirectory() as folder:
            tokenizer = load_tokenizer(write_json(Path(folder) / "tokenizer.json", raw))
        peer = tokenizers.Tokenizer.from_str(json.dumps(raw))
        assert tokenizer.encode(text) == peer.encode(text, add_special_tokens=False).ids

    def test_added_tokens(self, tmp_path: Path) -> None:
        raw = sentencepiece_json(MODEL)
        new = [
            {"id": 330, "content": "<|im_end|>", "special": True},
            {"id": 331, "content": "<think>", "special": False},
        ]
        added = [*raw["added_tokens"], *new]
        tokenizer = self.load(tmp_path, added_tokens=added)
        assert tokenizer.vocab_size == 332
        assert tokenizer.eos_ids == {2, 330}
        assert tokenizer.decode([331, *tokenizer.encode("hello", mid_text=True), 330]) == "<think>hello"
        inside = self.load(tmp_path, added_tokens=added, vocab=PIECES | {"<think>": 331, "<|im_end|>": 330})
        assert (inside.special, inside.decode([331, 330])) == (tokenizer.special, "<think>")

    @pytest.mark.parametrize(
        ("changes", "says"),
        [
            ({"ignore_merges": True}, "its ignore_merges is True"),
            ({"dropout": 0.5}, "its dropout is 0.5"),
            ({"normalizer": {"type": "NFKC"}}, "its normalizer is {'type': 'NFKC'} and its pre_tokenizer None"),
            ({"normalizer": None}, "expected spaces to become ▁, and nothing else"),
            ({"pre_tokenizer": METASPACE}, "and its pre_tokenizer {'type': 'Metaspace'"),
            ({"normalizer": None, "pre_tokenizer": METASPACE | {"split": True}}, "expected spaces to become ▁"),
            ({"vocab": PIECES | {"日" * 6000: len(PIECES)}}, "too long to merge"),
            ({"vocab": PIECES | {"日" * 300: len(PIECES)}}, "a piece of 300 characters"),
            ({"vocab": PIECES | {"日": len(PIECES) + 1}}, "each once"),
            ({"vocab": {"?" if name == "<0x41>" else name: i for name, i in PIECES.items()}}, "damaged"),
            ({"merges": [["t", "h"], ["x", "yz"]]}, "damaged"),
            ({"added_tokens": [{"id": 400, "content": "<x>", "special": True}]}, "the added tokens' ids leave gaps"),
            ({"added_tokens": [{"id": n, "content": "<x>", "special": True} for n in (330, 331)]}, "leave gaps"),
            ({"added_tokens": [{"id": 330, "content": "word", "special": False}]}, "the added token 'word' is plain"),
        ],
    )
    def test_what_is_refused(self, changes: dict[str, Any], says: str, tmp_path: Path) -> None:
        with pytest.raises(MinisaError, match=re.escape(says)) as error:
            self.load(tmp_path, **changes)
        assert str(error.value).startswith(str(tmp_path / "tokenizer.json"))

    def test_a_piece_that_the_merges_do_not_make(self, tmp_path: Path) -> None:
        """sentencepiece joins any two pieces that are one together, listed or not."""
        raw = sentencepiece_json(MODEL)
        raw["model"]["merges"] = [pair for pair in raw["model"]["merges"] if "".join(pair) != "▁the"]
        tokenizer = load_tokenizer(write_json(tmp_path / "tokenizer.json", raw))
        peer = pytest.importorskip("tokenizers").Tokenizer.from_str(json.dumps(raw))
        assert tokenizer.encode("the the") == peer.encode("the the", add_special_tokens=False).ids
        assert tokenizer.decode([PIECES["▁the"]], mid_text=True) == " the"
        assert "▁the" not in tokenizer.special

    @staticmethod
    def load(folder: Path, **changes: Any) -> Tokenizer:
        return load_tokenizer(write_json(folder / "tokenizer.json", sentencepiece_json(MODEL, **changes)))


def test_pieces_and_replacements_of_absurd_length(sentencepiece_file: Path, tmp_path: Path) -> None:
    (tmp_path / "rules.tsv").write_text("23\t" + "62 " * 20_000)  # a character that stands for twenty thousand
    for options, says in (
        ({"normalization_rule_tsv": str(tmp_path / "rules.tsv")}, "a character is replaced by 20000 bytes"),
        ({"user_defined_symbols": ["a" * 4000 + "b"]}, "a piece of 4001 characters: expected at most 256"),
    ):
        sentencepiece_file.write_bytes(sentencepiece_model(**options))
        with pytest.raises(MinisaError, match=says):
            load_tokenizer(sentencepiece_file)


@pytest.mark.parametrize("character", ["a", " ", "\n", "é"])
def test_a_megabyte_in_one_sentence(sentencepiece_file: Path, character: str) -> None:
    tokenizer = load_tokenizer(sentencepiece_file)
    text = character * 1_000_000
    began = time.perf_counter()
    ids = tokenizer.encode(text)
    assert time.perf_counter() - began < 20
    assert tokenizer.decode(ids) == text
