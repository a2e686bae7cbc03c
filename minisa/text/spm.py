"""Sentencepiece vocabularies: Llama 1 and 2, Mistral v1 to v3, and the same in GGUF files and tokenizer.json.

The sentencepiece library does the work. A GGUF file holds tokens, scores and types but not the library's own file, and
a tokenizer.json tokens and merges, so that file is written here in memory; the messages and field numbers are those of
sentencepiece_model.proto.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping, Set
from io import BytesIO
from typing import Any

from sentencepiece import SentencePieceProcessor

from minisa.errors import MinisaError, shown
from minisa.text.bytelevel import bos_of, check_bpe, check_gapless, is_marker, pairs_of, require_marker
from minisa.text.merges import merge_order

_SPACE = "▁"  # how a piece spells a space
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6  # piece types; GGUF's token types are the same
_BPE = 2
_WRITE = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}  # a step of a tokenizer.json
_MAX_PIECE = 256  # characters; the makers' have up to 31, and at each place in a text the longest is looked for
_MAX_REPLACEMENT = 256  # bytes; the longest of Unicode's NFKC takes 33


class SentencePiece:
    """A sentencepiece vocabulary.

    pieces: the bytes of each id, empty for special tokens. special: name → id, of control and unknown pieces.
    dummy_prefix: whether a text is encoded as if a space stood before it, and one is taken off when decoding.
    """

    add_bos = True
    bos_id: int | None = None
    supposed: Set[str] = frozenset()

    def __init__(self, model: bytes) -> None:
        """model: the content of a tokenizer.model. Raises RuntimeError when it is damaged."""
        if not model:
            raise MinisaError("the file is empty: fetch it again")
        if (longest := _longest_replacement(model)) > _MAX_REPLACEMENT:
            raise MinisaError(f"a character is replaced by {longest} bytes: expected at most {_MAX_REPLACEMENT}")
        self._processor = processor = SentencePieceProcessor(model_proto=model)
        # Protobuf messages concatenate: this appends normalizer_spec { add_dummy_prefix: false }.
        self._without_prefix = SentencePieceProcessor(model_proto=model + proto_field(3, proto_field(3, 0)))
        ids = range(processor.vocab_size())
        names = [processor.id_to_piece(i) for i in ids]
        if (longest := max(map(len, names))) > _MAX_PIECE:
            raise MinisaError(f"a piece of {longest} characters: expected at most {_MAX_PIECE}")
        self.special = {names[i]: i for i in ids if processor.is_control(i) or processor.is_unknown(i)}
        self.pieces = [
            b"" if name in self.special else bytes([int(name[3:5], 16)]) if processor.is_byte(i) else self.spelled(name)
            for i, name in enumerate(names)
        ]
        self.dummy_prefix = processor.encode("a") != self._without_prefix.encode("a")

    def spelled(self, name: str) -> bytes:
        return name.replace(_SPACE, " ").encode()

    def encode(self, text: str, *, mid_text: bool) -> list[int]:
        processor = self._processor if self.dummy_prefix and not mid_text else self._without_prefix
        return processor.encode(text)


def from_gguf(metadata: Mapping[str, Any]) -> SentencePiece:
    """A GGUF file's tokenizer.ggml.* keys where tokenizer.ggml.model is "llama".

    A marker that a user defined becomes a control piece: sentencepiece would find it in plain text. It does find words
    and spaces that a user defined, as it should.
    """
    names, scores, kinds = (metadata[f"tokenizer.ggml.{key}"] for key in ("tokens", "scores", "token_type"))
    pieces = list(zip(names, scores, kinds, strict=True))
    normal = [score for _, score, kind in pieces if kind == _NORMAL]
    if len(normal) > 1 and len(set(normal)) == 1:  # llama.cpp's converter has none to give without a tokenizer.model
        raise MinisaError("tokenizer.ggml.scores are all alike: expected a file made with the model's tokenizer.model")
    for i, (name, _, kind) in enumerate(pieces):
        if kind == _USER_DEFINED:
            pieces[i] = name.replace(" ", _SPACE), 0.0, _CONTROL if is_marker(name) else kind
    return SentencePiece(_model(pieces, metadata.get("tokenizer.ggml.add_space_prefix", True)))


def from_tokenizer_json(raw: Mapping[str, Any]) -> SentencePiece:
    """Hugging Face's tokenizer.json where its model falls back on bytes: what sentencepiece models are converted to.

    A piece's score is its place in the order of merging. What merging never makes goes in as a control piece, which
    sentencepiece leaves alone. Before a text that begins with a space newer files put no other; sentencepiece does, and
    takes it off again.
    """
    model = raw["model"]
    check_bpe(model, "ignore_merges")
    vocab: dict[str, int] = model["vocab"]
    check_gapless(vocab.values())
    added = {token["content"]: token["special"] for token in raw.get("added_tokens") or []}
    visible = {name for name, is_special in added.items() if not is_special}
    for name in visible:
        require_marker(name)
    names = sorted(vocab, key=vocab.__getitem__)
    kinds = dict.fromkeys(names, _NORMAL) | dict.fromkeys(added, _CONTROL)
    kinds |= dict.fromkeys((f"<0x{byte:02X}>" for byte in range(256)), _BYTE)
    kinds[model.get("unk_token") or "<unk>"] = _UNKNOWN  # newer files leave it out; no text comes to it
    normal = [name for name in names if kinds[name] == _NORMAL]
    listed = ((left, right) for left, right in pairs_of(model))
    pairs = [pair for pair in listed if {kinds[name] for name in (*pair, "".join(pair))} == {_NORMAL}]
    scores = {name: -float(place) for place, name in enumerate(merge_order(pairs, normal))}
    loose = {name for name in normal if len(name) > 1} - scores.keys()
    kinds |= dict.fromkeys(loose, _CONTROL)
    vocabulary = SentencePiece(_model(((name, scores.get(name, 0.0), kinds[name]) for name in names), _prefix_of(raw)))
    vocabulary.special = {name: i for name, i in vocabulary.special.items() if name not in loose}
    for name in loose | (visible & vocab.keys()):
        vocabulary.pieces[vocab[name]] = vocabulary.spelled(name)
    vocabulary.bos_id = bos_of(raw)
    vocabulary.add_bos = vocabulary.bos_id is not None
    return vocabulary


def _prefix_of(raw: Mapping[str, Any]) -> bool:
    """Whether a tokenizer.json puts a space before a text. Raises MinisaError where it does more than write ▁."""
    normalizer, pre_tokenizer = raw.get("normalizer") or {}, raw.get("pre_tokenizer")
    match normalizer.get("normalizers", [normalizer]), pre_tokenizer:
        case [{"type": "Prepend", "prepend": "▁"}, last], None if last == _WRITE:
            return True
        case [last], None if last == _WRITE:
            return False
        case [only], {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False} if not only:
            return scheme != "never"
    raise MinisaError(
        f"its normalizer is {shown(raw.get('normalizer'))} and its pre_tokenizer {shown(pre_tokenizer)}: expected "
        "spaces to become ▁, and nothing else"
    )


def _model(pieces: Iterable[tuple[str, float, int]], prefix: bool) -> bytes:
    """A tokenizer.model of (piece, score, type) in the order of their ids."""
    model = b"".join(
        proto_field(1, proto_field(1, name.encode()) + proto_field(2, score) + proto_field(3, kind))
        for name, score, kind in pieces
    )
    trainer = proto_field(3, _BPE) + proto_field(35, 1)  # model_type, byte_fallback
    normalizer = proto_field(1, b"identity") + proto_field(3, int(prefix)) + proto_field(4, 0) + proto_field(5, 1)
    return model + proto_field(2, trainer) + proto_field(3, normalizer)


def _longest_replacement(model: bytes) -> int:
    """Bytes of the longest string in precompiled_charsmap, what its normalizer puts in the place of characters."""
    longest = 0
    for spec in _messages(model, 3):
        for charsmap in _messages(spec, 2):  # the length of a trie, the trie, strings that end in \0
            strings = charsmap[4 + int.from_bytes(charsmap[:4], "little") :].split(b"\0")
            longest = max(longest, *map(len, strings))
    return longest


# Protobuf's wire format: a field is a tag (field number · 8 + wire type) and its value.


def proto_field(number: int, value: float | bytes) -> bytes:
    """A field: a whole number, a float of 32 bits, or the bytes of a string or message."""
    if isinstance(value, bytes):
        return _varint(number << 3 | 2) + _varint(len(value)) + value
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    return _varint(number << 3 | 5) + struct.pack("<f", value)


def _varint(number: int) -> bytes:
    """A whole number, seven bits a byte, the lowest first."""
    return bytes([number]) if number < 0x80 else bytes([number & 0x7F | 0x80]) + _varint(number >> 7)


def _read_varint(stream: BytesIO) -> int:
    byte = stream.read(1)[0]
    return byte if byte < 0x80 else byte & 0x7F | _read_varint(stream) << 7


def _messages(message: bytes, field: int) -> Iterator[bytes]:
    """The values of a field that are messages or strings. Raises KeyError or IndexError for what is no message."""
    stream = BytesIO(message)
    while stream.tell() < len(message):
        number, kind = divmod(_read_varint(stream), 8)
        if kind == 0:
            _read_varint(stream)
            continue
        value = stream.read(_read_varint(stream) if kind == 2 else {1: 8, 5: 4}[kind])
        if number == field:
            yield value
