"""Chat prompts: messages to token ids, by the Jinja template that the checkpoint brings or one of text/formats.

A template runs in jinja2's sandbox, set up as transformers sets it up, and the ids are those of transformers'
`apply_chat_template(tokenize=True)`, with two differences:

* Nobody can forge a role. Wherever a message's text spells a special token, or ends in the beginning of one, a guard
  is put inside: a character that occurs in no message. The rendered text is split at special tokens, which now are the
  template's own, and the guard is taken out of the text between them. Of the assistant's messages <think> and </think>
  stay as they are: templates look for them, and they end no turn. Not guarded are markers that are plain text in a
  format, such as Llama 2's [INST]: our own templates refuse a message that spells one, others are the publisher's
  responsibility.
* The clock stands still, at 26 Jul 2024, the date that Llama 3's templates have without a clock: a prompt is the same
  every day, and what a cache holds of it stays good.

A chat whose last message is the assistant's is one to be continued: the prompt ends where that message does.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minisa.errors import MinisaError, shown
from minisa.files import read_plain

if TYPE_CHECKING:
    from minisa.text.tokenizer import Tokenizer

Message = Mapping[str, Any]  # {"role": "user", "content": text or parts}, and whatever else the template reads

_FOLDER = Path(__file__).parent / "formats"
FORMATS: tuple[str, ...] = tuple(sorted(file.stem for file in _FOLDER.glob("*.jinja")))

CLOCK = datetime.datetime(2024, 7, 26)
MAX_TEMPLATE = 1 << 20  # bytes
_ROLES = ("system", "user", "assistant")  # of our own formats
_THOUGHTS = ("<think>", "</think>")

# A special token that the format cannot do without.
_NEEDED = {
    "chatml": "<|im_start|>",
    "llama3": "<|start_header_id|>",
    "mistral-v2": "[INST]",
    "mistral-v3": "[INST]",
    "mistral-v7": "[SYSTEM_PROMPT]",
}
# In the makers' own layouts, the format by the first of these tokens that the vocabulary has. Of the one with None,
# which is newer, the format is not known here.
_BY_TOKEN = {
    "<|start_header_id|>": "llama3",
    "[MODEL_SETTINGS]": None,
    "[SYSTEM_PROMPT]": "mistral-v7",
    "[INST]": "mistral-v3",
}
# What Mistral publishes at Hugging Face with no tokenizer but tekken.json are instruct models without a template.
_TEKKEN_ALONE = {"params.json", "config.json", "tekken.json"}
_LAYOUT = (*_TEKKEN_ALONE, "tokenizer_config.json", "tokenizer.json")


def find_template(
    path: str | Path, tokenizer: Tokenizer, chat_format: str | None = None, known: str | None = None
) -> ChatTemplate:
    """The chat template of the model at a path.

    It is the one that `chat_format` names (one of FORMATS, or a .jinja file); else the checkpoint's own; else the
    format that `known` names; else, in Meta's and Mistral's own layouts, which have no place for a template, the one
    that the special tokens speak for; else "raw", which joins the messages' texts.
    Raises MinisaError for an unknown format and for a template that Jinja cannot read.
    """
    tokenizer.encode("")  # where there is no tokenizer, it says so
    if chat_format is None and tokenizer.chat_template is not None:
        return ChatTemplate(f"the chat template of {path}", tokenizer.chat_template, tokenizer)
    name = chat_format or known or _by_special_tokens(path, tokenizer)
    return ChatTemplate(name, read_format(name), tokenizer, own=name in FORMATS)


def read_format(name: str) -> str:
    """The template that a format's name or a .jinja file's path stands for. Raises MinisaError where there is none."""
    file = _FOLDER / f"{name}.jinja" if name in FORMATS else Path(str(name))
    if file.suffix != ".jinja":
        raise MinisaError(f"chat_format is {shown(name)}: expected one of {', '.join(FORMATS)}, or a .jinja file")
    try:
        return read_plain(file, MAX_TEMPLATE, "chat template").decode()
    except (OSError, UnicodeDecodeError) as error:
        raise MinisaError(f"chat_format {file}: {error}: expected a Jinja template in UTF-8") from None


def _by_special_tokens(path: str | Path, tokenizer: Tokenizer) -> str:
    there = {name for name in _LAYOUT if (Path(path) / name).is_file()}
    makers_own = "params.json" in there and ("config.json" not in there or there == _TEKKEN_ALONE)
    token = next((token for token in _BY_TOKEN if token in tokenizer.special), None)
    if not makers_own or token is None:
        return "raw"
    name = _BY_TOKEN[token]
    if name is None:
        raise MinisaError(f"{path}: a chat format with {token} is not known: name one (--chat-format), or take --raw")
    return name


class ChatTemplate:
    """A chat template, bound to the tokenizer whose ids it gives.

    name: one of FORMATS, a file, or whose template it is.
    """

    def __init__(
        self, name: str, source: str, tokenizer: Tokenizer, *, own: bool = False, clock: datetime.datetime = CLOCK
    ) -> None:
        """own: it is one of FORMATS: sentencepiece's spaces are where the makers' code has them, and parts of a message
        are joined. clock: what the template is told when it asks for the time.

        Raises MinisaError where the source is no Jinja template, and where the vocabulary lacks a format's tokens.
        """
        if own and _NEEDED.get(name, name) not in (name, *tokenizer.special):
            raise MinisaError(f"the {name} chat format needs the token {_NEEDED[name]}: the vocabulary has none")
        self.name = name
        self._source = source
        self._tokenizer = tokenizer
        self._own = own
        self._special = [token for token in tokenizer.special if len(token) > 1]
        from minisa.text.sandbox import compile_template  # jinja2 takes a tenth of a second to import

        with self._errors():
            self._template = compile_template(source, clock)

    def ids(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None) -> list[int]:
        """The ids of the prompt to answer: the header of the assistant's turn included, or its last message, if that is
        the assistant's, left open to be continued.

        tools: JSON schemas, for templates that have a place for them.
        Raises MinisaError for messages that the template refuses or fails for.
        """
        if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
            raise MinisaError(f"messages is {shown(messages)}: expected a list of them, at least one")
        guard, mark = self._unused_characters(messages, tools)
        chat = []
        for number, message in enumerate(messages):
            role = message.get("role") if isinstance(message, Mapping) else None
            if not isinstance(role, str):
                raise MinisaError(f"messages[{number}] is {shown(message)}: expected role and content")
            if self._own and role not in _ROLES:
                raise MinisaError(f"messages[{number}]: role {role!r} is unknown: expected {', '.join(_ROLES)}")
            given = {key: value for key, value in message.items() if value is not None}  # as transformers has it
            if self._own and isinstance(parts := given.get("content"), list | tuple):
                given["content"] = "".join(part["text"] for part in _texts(parts))
            chat.append(self._guarded(given, guard, _THOUGHTS if role == "assistant" else ()))
        continues = chat[-1]["role"] == "assistant" and _append(chat[-1], mark + " ")
        text = self._render(chat, self._guarded(tools, guard), add_generation_prompt=not continues)
        if continues:
            text, found, rest = text.rpartition(mark)
            if not found:
                raise MinisaError(f"messages: {self._what} leaves out the assistant's last one, to be continued")
            text = text if rest.startswith(" ") else text.rstrip()  # the template has taken off the space
        text = text.replace(json.dumps(guard)[1:-1], guard)  # in ASCII, where the template wants that
        return self._tokenizer.encode_with_special(text, guard=guard, makers_spaces=self._own)

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """The tokens that end the assistant's turn: the tokenizer's own, the one that the template writes behind an
        answer, and the one that it opens the next turn with, should a model forget to end its own."""
        turns = ("user", "question"), ("assistant", "{answer}"), ("user", "{next}")
        try:
            text = self._render([{"role": role, "content": content} for role, content in turns], None)
        except MinisaError:
            return self._tokenizer.eos_ids
        between = text.partition("{answer}")[2].partition("{next}")[0]
        names = self._tokenizer.split_at_special(between)[1::2]
        return self._tokenizer.eos_ids.union(self._tokenizer.special[name] for name in names[:2])

    def _render(self, chat: list[Any], tools: Any, add_generation_prompt: bool = False) -> str:
        names: dict[str, Any] = {**self._tokenizer.named, "add_bos_token": self._tokenizer.add_bos, "documents": None}
        names |= {"messages": chat, "tools": tools, "add_generation_prompt": add_generation_prompt}
        with self._errors():
            return self._template(names)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """A template is a program, and may fail in any way. What it says by raise_exception is about the messages."""
        try:
            yield
        except Exception as error:
            reason = f"{error}"[:300]
            if (kind := type(error).__name__) == "Refused":
                raise MinisaError(f"messages: {self._what} refuses them: {reason}") from None
            what = f"{self._what} fails ({kind}: {reason})"
            raise MinisaError(f"{what}: check the messages, or name another (--chat-format)") from None

    @property
    def _what(self) -> str:
        return f"the {self.name} chat format" if self._own else self.name

    def _unused_characters(self, *given: Any) -> list[str]:
        """Two that occur nowhere in what is given, the template and the special tokens: of Braille, say, which is no
        space, has no case, and is written by JSON and Python as it is."""
        taken = self._source + "".join(self._special) + repr(given)
        free = (c for c in map(chr, range(0x2800, 0xD800)) if c not in taken and json.dumps(c)[1:-1] not in taken)
        found = list(islice(free, 2))
        if len(found) < 2:
            raise MinisaError("messages: they have every character from U+2800 to U+D7FF: expected text")
        return found

    def _guarded(self, value: Any, guard: str, allowed: Sequence[str] = ()) -> Any:
        """A copy with the guard behind the first character of whatever could be read as a special token."""
        if isinstance(value, Mapping):
            return {self._guarded(key, guard): self._guarded(item, guard, allowed) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._guarded(item, guard, allowed) for item in value]
        if not isinstance(value, str | int | float | None):
            raise MinisaError(f"messages: {shown(value)} in them: expected text, numbers, lists and objects")
        if not isinstance(value, str):
            return value
        places = {found.start() for found in self._spelled.finditer(value) if found[1] not in allowed}
        for start in range(max(0, len(value) - max(map(len, self._special), default=0)), len(value)):
            if any(name.startswith(value[start:]) for name in self._special):  # the next message may have its end
                places.add(start)
        return "".join(char + guard * (place in places) for place, char in enumerate(value)) if places else value

    @cached_property
    def _spelled(self) -> re.Pattern[str]:
        """Every place where a special token begins, in whatever case: a template may change that."""
        names = "|".join(map(re.escape, sorted(self._special, key=len, reverse=True)))
        first = "".join(map(re.escape, {name[0] for name in self._special}))  # most of a text is skipped at once
        return re.compile(f"(?=[{first}])(?=({names}))" if names else "(?!)", re.IGNORECASE)


def _texts(parts: Sequence[Any]) -> list[Any]:
    """Of the parts that a message's content may be in, those that are text."""
    return [part for part in parts if isinstance(part, Mapping) and isinstance(part.get("text"), str)]


def _append(message: dict[str, Any], text: str) -> bool:
    """Put text behind a message's content, or behind the last of its parts that is text; whether there was any."""
    content = message.get("content")
    if isinstance(content, str):
        message["content"] += text
        return True
    parts = _texts(content) if isinstance(content, list) else []
    if parts:
        parts[-1]["text"] += text
    return bool(parts)
