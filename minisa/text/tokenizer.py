"""One tokenizer over byte-level BPE and sentencepiece, whichever the model's maker chose.

Text goes in as plain text: `encode` reads nothing in it as a special token, whatever it spells. `encode_with_special`
does; it is for prompts that chat.py has made safe.
"""

from __future__ import annotations

import codecs
import re
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from functools import cached_property
from os.path import lexists
from pathlib import Path
from typing import Any, NoReturn, Protocol

from minisa.checkpoint.gguf import find_gguf, gguf_parts, is_gguf, read_gguf
from minisa.errors import MinisaError, shown
from minisa.files import read_json, read_plain
from minisa.text import bytelevel, spm
from minisa.text.added_tokens import add_tokens

BOS_NAMES = ("<|begin_of_text|>", "<s>")
EOS_NAMES = ("</s>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|endoftext|>")

_FILES = "tokenizer.model, tekken.json, tokenizer.json or a .gguf file"
_SETTINGS = tuple(
    f"{name}.json" for name in ("tokenizer_config", "chat_template", "added_tokens", "generation_config", "config")
)
_MAX_MODEL = 8 << 20  # bytes; the largest tokenizer.model takes 4 MB
_MAX_TEMPLATE = 1 << 20  # bytes
_MAX_SPECIAL = 1 << 15  # special tokens; the makers' have up to 1,000, and what pads a vocabulary counts too
_MAX_NAME = 128  # characters of a special token; the makers' have up to 31
_TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+=* \d+\r?\n")


class Vocabulary(Protocol):
    """What a Tokenizer is built over: bytelevel.ByteLevelBPE or spm.SentencePiece, which explain its attributes."""

    pieces: list[bytes]
    special: dict[str, int]
    dummy_prefix: bool
    add_bos: bool
    bos_id: int | None
    supposed: Set[str]

    def spelled(self, name: str) -> bytes: ...
    def encode(self, text: str, *, mid_text: bool) -> list[int]: ...


def check_ids(ids: Sequence[int], vocab_size: int, what: str) -> None:
    """Raises MinisaError where there are none, or one is no row of the embedding; what: names them in the message."""
    if not ids:
        raise MinisaError(f"{what} is empty: give at least one token")
    outside = next((token for token in ids if not 0 <= token < vocab_size), None)
    if outside is not None:
        raise MinisaError(f"{what} has token id {shown(outside)}: the vocabulary is 0 to {vocab_size - 1}")


class Tokenizer:
    """Text to token ids and back.

    special: the special tokens, name → id. They have no text: decoding leaves them out, but for those that a
        fine-tuner added and did not mark as special.
    bos_id: the token that begins a text, if the vocabulary has one.
    add_bos: whether the maker's own tokenizer puts it before plain text (SmolLM2's does not).
    eos_id: the one that the tokenizer's files call its EOS, or else a well-known one, if it has any.
    eos_ids: every token that ends a turn or a text.
    chat_template: the Jinja template that came with the tokenizer, if one did.
    named: what its files call the special tokens, such as bos_token → "<s>": a chat template's variables.

    Sentencepiece encodes a text as if a space stood before it and takes that space off when decoding. What goes on
    from other text is `mid_text`: no space is put before it nor taken off. So, wherever n does not cut a character,
    `decode(ids) == decode(ids[:n]) + decode(ids[n:], mid_text=True)`. Byte-level vocabularies know no such space.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        *,
        bos_id: int | None,
        eos_ids: Sequence[int],
        add_bos: bool,
        chat_template: str | None = None,
        named: Mapping[str, str] | None = None,
        space_at_start_only: bool = False,
    ) -> None:
        """eos_ids: those the files name, the tokenizer's own first; the well-known ones are found here.
        space_at_start_only: where special tokens are spelled out, no space is put before the text behind one.

        Raises MinisaError for an id outside the vocabulary, and for a special token that plain text could spell.
        """
        self._vocabulary = vocabulary
        self._pieces = vocabulary.pieces
        self.special = vocabulary.special
        self.bos_id = bos_id
        self.add_bos = bool(add_bos) and bos_id is not None
        ends = [*eos_ids, *(self.special[name] for name in EOS_NAMES if name in self.special)]
        self.eos_id = ends[0] if ends else None
        self.eos_ids = frozenset(ends)
        self.chat_template = chat_template
        self._space_at_start_only = space_at_start_only
        names = {token_id: name for name, token_id in self.special.items()}
        ours = {"bos_token": names.get(bos_id), "eos_token": names.get(self.eos_id)}  # type: ignore[arg-type]
        self.named = {key: name for key, name in ours.items() if name is not None} | dict(named or {})
        for token_id in self.eos_ids if bos_id is None else self.eos_ids | {bos_id}:
            if isinstance(token_id, bool) or not isinstance(token_id, int) or not 0 <= token_id < self.vocab_size:
                raise MinisaError(f"bos_token_id or eos_token_id is {token_id!r}: expected 0 to {self.vocab_size - 1}")
        if chat_template is not None and not isinstance(chat_template, str):
            raise MinisaError(f"chat_template is {chat_template!r}: expected a string")
        if len(self.special) > _MAX_SPECIAL:  # each is tried below
            raise MinisaError(f"{len(self.special)} special tokens: expected at most {_MAX_SPECIAL}")
        for name, token_id in self.special.items():
            if len(name) > _MAX_NAME:
                raise MinisaError(f"a special token of {len(name)} characters: expected at most {_MAX_NAME}")
            if token_id in vocabulary.encode(name, mid_text=False):
                raise MinisaError(f"plain text can spell the special token {name!r}: expected it to be a control piece")

    @property
    def vocab_size(self) -> int:
        """One more than the largest id. A model's embedding may have more rows, for padding."""
        return len(self._pieces)

    @property
    def bos_ids(self) -> list[int]:
        """What comes before plain text: the BOS token where the maker's own tokenizer puts it, else nothing."""
        return [self.bos_id] if self.add_bos and self.bos_id is not None else []

    def encode(self, text: str, *, mid_text: bool = False) -> list[int]:
        """The ids of plain text: no BOS, and no special token whatever the text spells.

        Raises MinisaError when the text is not valid Unicode.
        """
        if half := re.search(r"[\ud800-\udfff]", text):
            raise MinisaError(f"character {half.start()} of the text is half a surrogate pair: expected Unicode")
        return self._vocabulary.encode(text, mid_text=mid_text)

    def encode_with_special(self, text: str, *, guard: str = "", makers_spaces: bool = False) -> list[int]:
        """The ids of a text that spells special tokens out. Between two of them it is encoded as one piece.

        guard: a character that keeps text from being read as a special token; it is taken out between them.
        makers_spaces: sentencepiece's space is put behind every special token, whatever tokenizer_config.json says.
        """
        ids: list[int] = []
        for number, part in enumerate(self.split_at_special(text)):
            if number % 2:
                ids.append(self.special[part])
            elif plain := part.replace(guard, "") if guard else part:
                mid_text = number > 0 and self._space_at_start_only and not makers_spaces
                ids += self.encode(plain, mid_text=mid_text)
        return ids

    def split_at_special(self, text: str) -> list[str]:
        """Plain text, the name of a special token, plain text, and so on. The longest name at a place counts."""
        return self._special_names.split(text)

    @cached_property
    def _special_names(self) -> re.Pattern[str]:
        names = sorted((name for name in self.special if len(name) > 1), key=len, reverse=True)
        beginnings = "".join(map(re.escape, {name[0] for name in names}))  # skips most of a text at once
        return re.compile(f"(?=[{beginnings}])({'|'.join(map(re.escape, names))})" if names else "((?!))")

    def decode(self, ids: Iterable[int], *, mid_text: bool = False) -> str:
        """The text of ids. Bytes that are no UTF-8 become U+FFFD."""
        stream = self.stream(mid_text=mid_text)
        return "".join(map(stream.feed, ids)) + stream.flush()

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token stands for; none for a special token or one that only pads the embedding."""
        return self._pieces[token_id] if 0 <= token_id < len(self._pieces) else b""

    def stream(self, *, mid_text: bool = False) -> TextStream:
        """Decode ids one by one: the texts together are what `decode` makes of all the ids."""
        return TextStream(self, strip_space=self._vocabulary.dummy_prefix and not mid_text)


class TextStream:
    """Token ids in, text out, never half a UTF-8 character."""

    def __init__(self, tokenizer: Tokenizer, *, strip_space: bool) -> None:
        """strip_space: take off the space that sentencepiece puts before a text."""
        self._token_bytes = tokenizer.token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip_space = strip_space

    def feed(self, token_id: int) -> str:
        """The text that is certain with this token; empty while a character is incomplete."""
        data = self._token_bytes(token_id)
        if self._strip_space and data:
            data = data.removeprefix(b" ")
            self._strip_space = False
        return self._utf8.decode(data)

    def flush(self) -> str:
        """What is left when no more tokens come: U+FFFD for an incomplete character."""
        return self._utf8.decode(b"", final=True)


class NoTokenizer(Tokenizer):
    """In the place of the tokenizer that a checkpoint does not have: token ids stream no text, and text is refused."""

    def __init__(self, where: Path, eos_ids: Sequence[int] = ()) -> None:
        self.special, self.named, self._pieces = {}, {}, []
        self.bos_id, self.add_bos, self.chat_template = None, False, None
        self.eos_id, self.eos_ids = next(iter(eos_ids), None), frozenset(eos_ids)
        self._where = where

    def encode(self, text: str, *, mid_text: bool = False) -> NoReturn:
        raise MinisaError(f"{self._where}: no tokenizer, so no text: give token ids, or put {_FILES} there")

    def decode(self, ids: Iterable[int], *, mid_text: bool = False) -> NoReturn:
        self.encode("")

    def stream(self, *, mid_text: bool = False) -> TextStream:
        return TextStream(self, strip_space=False)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer at a path; a NoTokenizer for a checkpoint that comes without one.

    path: a directory in Hugging Face's, Meta's or Mistral's layout, or one of the files a tokenizer comes in:
        tokenizer.model (sentencepiece's or Llama 3's), tekken.json, tokenizer.json, or a .gguf file. What the files
        of _SETTINGS and chat_template.jinja beside it say counts too.
    Raises MinisaError when it is damaged or of a kind that minisa does not know.
    """
    path = Path(path)
    file, folder = (_find(path), path) if path.is_dir() else (path, path.parent)
    try:
        if file is not None and (file.suffix == ".gguf" or is_gguf(file)):
            file = next(gguf_parts(file))
            metadata = read_gguf(file).metadata
            with _naming(file):
                return _from_gguf(metadata) if "tokenizer.ggml.model" in metadata else NoTokenizer(file)
        settings = {name: read_json(folder / name) if lexists(folder / name) else {} for name in _SETTINGS}
        if file is None:
            with _naming(folder):
                return NoTokenizer(folder, _named_ends(settings))
        content = read_json(file) if file.suffix == ".json" else read_plain(file, _MAX_MODEL, "tokenizer")
        template = folder / "chat_template.jinja"
        with _naming(file):
            vocabulary = _vocabulary(content)
        with _naming(folder):
            own = read_plain(template, _MAX_TEMPLATE, "template").decode() if lexists(template) else None
            scheme = (content.get("pre_tokenizer") or {}).get("prepend_scheme") if isinstance(content, dict) else None
            return _with_settings(vocabulary, settings, own, scheme)
    except OSError as error:
        wrong = Path(error.filename or file or folder)
        expected = _FILES if wrong == file else "a file, or nothing of that name"
        raise MinisaError(f"{wrong}: {error.strerror or error}: expected {expected}") from None


@contextmanager
def _naming(file: Path) -> Iterator[None]:
    """Put the file's name before what is wrong with its content."""
    try:
        yield
    except MinisaError as error:
        raise MinisaError(f"{file}: {error}") from None
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError, struct.error) as error:
        # Content of unexpected types can fail anywhere; to the user it is all the same.
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:120]
        raise MinisaError(f"{file}: no tokenizer, or a damaged one ({reason}): fetch it again") from error


def _find(directory: Path) -> Path | None:
    """The tokenizer's file in a directory; the maker's own format before Hugging Face's copy of it."""
    versions = sorted(directory.glob("tokenizer.model.v*"), reverse=True)  # Mistral's
    names = ("tokenizer.model", *(file.name for file in versions), "tekken.json", "tokenizer.json")
    for candidate in (*(directory / name for name in names), directory / "original" / "tokenizer.model"):
        if candidate.is_file():
            return candidate
    models = find_gguf(directory)
    return models[0] if len(models) == 1 else None


def _vocabulary(content: dict[str, Any] | bytes) -> Vocabulary:
    if isinstance(content, bytes):
        return bytelevel.from_tiktoken(content) if _TIKTOKEN_LINE.match(content) else spm.SentencePiece(content)
    if "model" not in content:
        return bytelevel.from_tekken(content)
    if not content["model"].get("byte_fallback"):
        return bytelevel.from_tokenizer_json(content)
    vocabulary = spm.from_tokenizer_json(content)
    add_tokens(vocabulary, {str(token["id"]): token for token in content.get("added_tokens") or []}, {})
    return vocabulary


def _with_settings(
    vocabulary: Vocabulary, settings: Mapping[str, Mapping[str, Any]], chat_template: str | None, scheme: str | None
) -> Tokenizer:
    """With what the files beside it say about a vocabulary; without them its maker's habits hold.

    scheme: where tokenizer.json puts a space: "always", "first" for the start of a text only, or None.
    """
    config = settings["tokenizer_config.json"]
    add_tokens(vocabulary, config.get("added_tokens_decoder") or {}, settings["added_tokens.json"])
    if config.get("add_prefix_space") is False:
        vocabulary.dummy_prefix = False
    elif config.get("add_prefix_space") and str(config.get("tokenizer_class")).startswith("GPT2"):
        raise MinisaError("tokenizer_config.json: add_prefix_space is true: expected false with GPT2Tokenizer")
    special = vocabulary.special
    named = {key: name for key, token in config.items() if key.endswith("_token") and (name := _name(token))}
    bos, eos = ([special[n] for n in (named.get(key),) if n in special] for key in ("bos_token", "eos_token"))
    if vocabulary.bos_id not in (None, *bos) and bos:
        puts = f"tokenizer.json's post_processor puts {vocabulary.bos_id} before a text"
        raise MinisaError(f"tokenizer_config.json: bos_token is {bos[0]}, and {puts}: expected the same")
    bos += [vocabulary.bos_id] if vocabulary.bos_id is not None else [special[n] for n in BOS_NAMES if n in special]
    add_bos = config.get("add_bos_token") if isinstance(vocabulary, spm.SentencePiece) else None  # no say in the others
    for found in (settings["chat_template.json"].get("chat_template"), config.get("chat_template")):
        if isinstance(found, list):  # several, by name
            found = {entry["name"]: entry["template"] for entry in found}.get("default")
        chat_template = found if chat_template is None else chat_template
    return Tokenizer(
        vocabulary,
        bos_id=bos[0] if bos else None,
        eos_ids=[*eos, *_named_ends(settings)],
        add_bos=vocabulary.add_bos if add_bos is None else add_bos,
        chat_template=chat_template,
        named=named,
        space_at_start_only=config.get("legacy") is False or (scheme == "first" and config.get("legacy") is None),
    )


def _named_ends(settings: Mapping[str, Mapping[str, Any]]) -> list[int]:
    """The ids that generation_config.json and config.json call eos_token_id."""
    found = [settings[name].get("eos_token_id") for name in ("generation_config.json", "config.json")]
    return [token_id for ids in found for token_id in (ids if isinstance(ids, list) else [ids]) if token_id is not None]


def _from_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
    kind = metadata.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise MinisaError(f"tokenizer.ggml.model is {kind!r}: expected 'gpt2' (byte-level) or 'llama' (sentencepiece)")
    vocabulary: Vocabulary = bytelevel.from_gguf(metadata) if kind == "gpt2" else spm.from_gguf(metadata)
    ends = (metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom"))
    return Tokenizer(
        vocabulary,
        bos_id=metadata.get("tokenizer.ggml.bos_token_id"),
        eos_ids=[token_id for token_id in ends if token_id is not None],
        add_bos=metadata.get("tokenizer.ggml.add_bos_token", vocabulary.add_bos),
        chat_template=metadata.get("tokenizer.chat_template"),
    )


def _name(token: Any) -> str | None:
    """A token's name as tokenizer_config.json has it, a string or an object; None for null."""
    name = token.get("content") if isinstance(token, dict) else token
    return name if isinstance(name, str) else None
