"""Sentencepiece vocabularies: Llama 1 and 2, Mistral v1 to v3, and the same in GGUF files and tokenizer.json.

The sentencepiece library does the work. A GGUF file holds tokens, scores and types but not the library's own file, and
a tokenizer.json tokens and merges, so that file is written here in memory; the messages and field numbers are those of
sentencepiece_model.proto.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterable, Iterator, Mapping, Set
from typing import Any

import sentencepiece

from minisa.errors import MinisaError, shown
from minisa.text.bytelevel import bos_of, check_bpe, check_ids, is_marker, pairs_of, require_marker
from minisa.text.merges import MAX_LENGTH, rank_merges

_SPACE = "▁"  # how a piece spells a space
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6  # piece types; GGUF's token types are the same
_BPE = 2
_WRITE = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}  # steps of a tokenizer.json
_READ = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
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
        if any(charsmap for spec in _fields(model, 5) for charsmap in _fields(spec, 2)):
            raise MinisaError("it has a denormalizer_spec: minisa decodes what the pieces spell")
        self._model = model
        self._processor = _processor(model)
        if (spelled := self._processor.normalize("a")) not in ("a", f"{_SPACE}a"):
            raise MinisaError(f"it takes 'a' for {spelled!r}: expected 'a', or that behind {_SPACE}")
        names = [self._processor.id_to_piece(i) for i in range(self._processor.vocab_size())]
        if (longest := max(map(len, names))) > _MAX_PIECE:
            raise MinisaError(f"a piece of {longest} characters: expected at most {_MAX_PIECE}")
        hidden = [self._processor.is_control(i) or self._processor.is_unknown(i) for i in range(len(names))]
        self.special = {name: i for i, name in enumerate(names) if hidden[i]}
        self.pieces = [
            b"" if hidden[i] else _byte(name) if self._processor.is_byte(i) else self.spelled(name)
            for i, name in enumerate(names)
        ]
        self.dummy_prefix = True
        self.dummy_prefix = self.encode("a", mid_text=False) != self.encode("a", mid_text=True)

    @functools.cached_property
    def _without_prefix(self) -> Any:
        # Protobuf messages concatenate: this appends normalizer_spec { add_dummy_prefix: false }.
        return _processor(self._model + _message(3, _number(3, 0)))

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
    pieces = list(
        zip(
            metadata["tokenizer.ggml.tokens"],
            metadata["tokenizer.ggml.scores"],
            metadata["tokenizer.ggml.token_type"],
            strict=True,
        )
    )
    scores = [score for _, score, kind in pieces if kind == _NORMAL]
    if len(scores) > 1 and len(set(scores)) == 1:  # llama.cpp's converter has none to give without a tokenizer.model
        raise MinisaError("tokenizer.ggml.scores are all alike: expected a file made with the model's tokenizer.model")
    listed = (
        (piece, score, int(kind))
        if kind != _USER_DEFINED
        else (piece.replace(" ", _SPACE), 0.0, _CONTROL if is_marker(piece) else int(kind))
        for piece, score, kind in pieces
    )
    return SentencePiece(_bpe(listed, prefix=bool(metadata.get("tokenizer.ggml.add_space_prefix", True))))


def from_tokenizer_json(raw: Mapping[str, Any]) -> SentencePiece:
    """Hugging Face's tokenizer.json where its model falls back on bytes: what sentencepiece models are converted to.

    A piece's score is the place of its merges. Before a text that begins with a space newer files put no other;
    sentencepiece does, and takes it off again. Raises MinisaError for merges that it would not follow.
    """
    model = raw["model"]
    check_bpe(model)
    if model.get("ignore_merges"):
        raise MinisaError("its ignore_merges is true: expected a converted sentencepiece model, which has none")
    vocab = model["vocab"]
    if max(map(len, vocab), default=0) > _MAX_PIECE or sum(map(len, vocab)) > MAX_LENGTH:  # all splits are looked at
        raise MinisaError(
            f"a piece of more than {_MAX_PIECE} characters, or pieces of more than {MAX_LENGTH} together: expected the "
            "makers' vocabulary"
        )
    if sorted(check_ids(vocab.values())) != list(range(len(vocab))):
        raise MinisaError("its vocabulary's ids leave gaps: is the file whole?")
    listed = raw.get("added_tokens") or []
    check_ids([token["id"] for token in listed])
    added = {token["content"]: token["special"] for token in listed}
    if len(added) < len(listed):
        raise MinisaError("an added token stands twice: is the file whole?")
    for name, is_special in added.items():
        if not is_special:
            require_marker(name)
    kinds = {name: _CONTROL if name in added else _NORMAL for name in vocab}
    kinds |= dict.fromkeys((f"<0x{byte:02X}>" for byte in range(256)), _BYTE)
    kinds[model.get("unk_token") or "<unk>"] = _UNKNOWN  # newer files leave it out; no text comes to it
    if lacking := kinds.keys() - vocab.keys():
        raise MinisaError(f"its vocabulary lacks {min(lacking)!r}: is the file whole?")
    normal = {name for name in vocab if kinds[name] == _NORMAL}
    pairs = []
    for left, right in pairs_of(model):
        joined = {kinds[name] for name in (left, right, left + right)}
        if _BYTE in joined:
            raise MinisaError(f"a merge joins {left!r} and {right!r}: sentencepiece joins no bytes")
        if joined == {_NORMAL}:  # what spells a special token no text comes to
            pairs.append((left, right))
    ranks = rank_merges(pairs, sorted(name for name in normal if len(name) == 1), strays=True, ties=True)
    for name in normal - ranks.keys():
        halves = ((name[:i], name[i:]) for i in range(1, len(name)))
        if any(all(len(half) == 1 or half in normal for half in pair) for pair in halves):
            raise MinisaError(f"no merge makes the token {name!r}, which sentencepiece would join: is the file whole?")
    pieces = ((name, -float(ranks.get(name, len(vocab))), kinds[name]) for name in sorted(vocab, key=vocab.__getitem__))
    vocabulary = SentencePiece(_bpe(pieces, prefix=_prefix_of(raw)))
    for name, is_special in added.items():
        if name in vocab and not is_special:
            vocabulary.pieces[vocab[name]] = vocabulary.spelled(name)
    vocabulary.bos_id = bos_of(raw)
    vocabulary.add_bos = vocabulary.bos_id is not None
    return vocabulary


def _prefix_of(raw: Mapping[str, Any]) -> bool:
    """Whether a tokenizer.json puts a space before a text. Raises MinisaError where it does not write spaces as ▁, or
    reads them otherwise."""
    steps = (raw.get("decoder") or {}).get("decoders", [])
    kinds = [step.get("type") for step in steps]
    if kinds[:3] != ["Replace", "ByteFallback", "Fuse"] or steps[0] != _READ or set(kinds[3:]) - {"Strip"}:
        raise MinisaError(f"its decoder is {shown(raw.get('decoder'))}: expected Replace ▁, ByteFallback and Fuse")
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


def _bpe(pieces: Iterable[tuple[str, float, int]], *, prefix: bool) -> bytes:
    """A tokenizer.model of (piece, score, type) in the order of their ids."""
    model = b"".join(
        _message(1, _string(1, piece), _float(2, score), _number(3, kind)) for piece, score, kind in pieces
    )
    trainer = _message(2, _number(3, _BPE), _number(35, 1))  # model_type, byte_fallback
    normalizer = _message(3, _string(1, "identity"), _number(3, prefix), _number(4, 0), _number(5, 1))
    return model + trainer + normalizer


def _processor(model: bytes) -> Any:
    return sentencepiece.SentencePieceProcessor(model_proto=model)


def _byte(piece: str) -> bytes:
    """A byte's piece is spelled <0x0A>."""
    return bytes([int(piece[3:5], 16)])


def _longest_replacement(model: bytes) -> int:
    """Bytes of the longest string in precompiled_charsmap, what its normalizer puts in the place of characters."""
    longest = 0
    for spec in _fields(model, 3):
        for charsmap in _fields(spec, 2):  # the length of a trie, the trie, strings that end in \0
            strings = charsmap[4 + int.from_bytes(charsmap[:4], "little") :].split(b"\0")
            longest = max(longest, *map(len, strings))
    return longest


# Protobuf's wire format: a field is a tag (field number · 8 + wire type) and its value.


@functools.lru_cache(1024)  # tags and lengths of pieces come back by the hundred thousand
def varint(number: int) -> bytes:
    """A whole number, seven bits a byte, the lowest first."""
    low = [number >> shift & 0x7F for shift in range(0, max(number.bit_length(), 1), 7)]
    return bytes([*(byte | 0x80 for byte in low[:-1]), low[-1]])


def _number(field: int, value: int) -> bytes:
    return varint(field << 3) + varint(value)


def _float(field: int, value: float) -> bytes:
    return varint(field << 3 | 5) + struct.pack("<f", value)


def _string(field: int, text: str) -> bytes:
    data = text.encode("utf-8", "surrogateescape")
    return varint(field << 3 | 2) + varint(len(data)) + data


def _message(field: int, *values: bytes) -> bytes:
    data = b"".join(values)
    return varint(field << 3 | 2) + varint(len(data)) + data


def _fields(message: bytes, field: int) -> Iterator[bytes]:
    """The values of a field that are messages or strings. Raises ValueError or IndexError for what is no message."""
    position = 0
    while position < len(message):
        if message[position] == 0x0A and field != 1 and message[position + 1] < 0x80:  # of pieces there are many
            position += 2 + message[position + 1]
            continue
        tag, position = varint_at(message, position)
        match tag & 7:
            case 2:
                length, position = varint_at(message, position)
                if tag >> 3 == field:
                    yield message[position : position + length]
                position += length
            case 0:
                _, position = varint_at(message, position)
            case 1 | 5 as kind:
                position += 8 if kind == 1 else 4
            case kind:
                raise ValueError(f"a field of wire type {kind}")


def varint_at(message: bytes, position: int) -> tuple[int, int]:
    """A number and where it ends. Raises ValueError for one of more than 64 bits."""
    number = message[position]
    shift = 7
    while message[position] >= 0x80:
        position += 1
        number += (message[position] - 1) << shift  # and takes off the bit that said that more would come
        shift += 7
        if shift > 70:
            raise ValueError("a number of more than 64 bits")
    return number, position + 1
