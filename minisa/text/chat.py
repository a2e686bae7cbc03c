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

A dialog whose last message is the assistant's is one to be continued: the prompt ends where that message does.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from minisa.errors import MinisaError, shown
from minisa.files import read_plain

if TYPE_CHECKING:
    from minisa.text.tokenizer import Tokenizer

Message = Mapping[str, Any]  # {"role": "user", "content": text or parts}, and whatever else the template reads

_FOLDER = Path(__file__).parent / "formats"
FORMATS: tuple[str, ...] = tuple(sorted(file.stem for file in _FOLDER.glob("*.jinja")))

CLOCK = datetime.datetime(2024, 7, 26)
MAX_TEMPLATE = 1 << 20  # bytes
MAX_PROMPT = 1 << 24  # characters
_THOUGHTS = ("<think>", "</think>")
_NEEDED = {"chatml": "<|im_start|>", "llama3": "<|start_header_id|>", "mistral-v2": "[INST]", "mistral-v3": "[INST]"}
_NEEDED["mistral-v7"] = "[SYSTEM_PROMPT]"

# Which format a vocabulary's special tokens speak for, in the makers' own layouts; the first that is there decides.
_BY_TOKEN = {
    "<|start_header_id|>": "llama3",
    "[MODEL_SETTINGS]": None,  # newer than what is known here
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
        """own: it is one of FORMATS, which follow the makers' code in where sentencepiece puts spaces.
        clock: what the template is told when it asks for the time.

        Raises MinisaError where the source is no Jinja template, and where the vocabulary lacks a format's tokens.
        """
        if (needed := _NEEDED.get(name)) is not None and own and needed not in tokenizer.special:
            raise MinisaError(f"the {name} chat format needs the token {needed}: the vocabulary has none")
        self.name = name
        self._tokenizer = tokenizer
        self._own = own
        self._names = [name for name in tokenizer.special if len(name) > 1]
        self._source = source
        sandbox = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        sandbox.filters["tojson"] = _to_json
        sandbox.globals |= {"raise_exception": _raise_exception, "strftime_now": clock.strftime}
        try:
            self._template = sandbox.from_string(source)
        except Exception as error:  # a template is a program: anything may be wrong with it
            raise self._failed(error) from None

    def ids(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None) -> list[int]:
        """The ids of the prompt to answer: the header of the assistant's turn included, or its last message, if that is
        the assistant's, left open to be continued.

        tools: JSON schemas, for templates that have a place for them.
        Raises MinisaError for messages that the template refuses or fails for.
        """
        if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
            raise MinisaError(f"messages is {shown(messages)}: expected a list of them, at least one")
        for number, message in enumerate(messages):
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
                raise MinisaError(f"messages[{number}] is {shown(message)}: expected role and content")
        guard, mark = self._unused(messages, tools)
        chat = [self._guarded(message, guard, message["role"] == "assistant") for message in self._plain(messages)]
        last = chat[-1]
        continues = last["role"] == "assistant" and _append(last, mark + " ")
        text = self._render(chat, self._guarded(self._plain(tools), guard), add_generation_prompt=not continues)
        if continues:
            text, found, behind = text.rpartition(mark)
            if not found:
                raise MinisaError(f"messages: {self.name} leaves out the assistant's last one, to be continued")
            text = text if behind.startswith(" ") else text.rstrip()
        text = text.replace(json.dumps(guard)[1:-1], guard)  # a template may have written it so
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
        variables = {"messages": chat, "tools": tools, "documents": None}
        names = {**self._tokenizer.named, "add_bos_token": self._tokenizer.add_bos}
        texts, length = [], 0
        try:
            for text in self._template.generate(**names, **variables, add_generation_prompt=add_generation_prompt):
                length += len(text)
                if length > MAX_PROMPT:
                    raise SecurityError(f"it writes more than {MAX_PROMPT} characters")
                texts.append(text)
        except _Refused as error:
            raise MinisaError(f"messages: {self._whose} refuses them: {error}") from None
        except Exception as error:  # a template is a program: it may fail in any way
            raise self._failed(error) from None
        return "".join(texts)

    @property
    def _whose(self) -> str:
        return f"the {self.name} chat format" if self._own else self.name

    def _failed(self, error: Exception) -> MinisaError:
        reason = f"{type(error).__name__}: {error}"[:300]
        return MinisaError(f"{self._whose} fails ({reason}): check the messages, or name another (--chat-format)")

    def _unused(self, *given: Any) -> list[str]:
        """Two characters that occur nowhere in what is given, the template and the special tokens: Braille's are no
        space, have no case, and JSON and Python write them as they are."""
        taken = self._source + "".join(self._names) + repr(given)
        free = (char for char in map(chr, range(0x2800, 0xD800)) if char not in taken)
        found = list(islice((char for char in free if json.dumps(char)[1:-1] not in taken), 2))
        if len(found) < 2:
            raise MinisaError("messages: they use every character of Unicode from U+2800: expected text")
        return found

    def _plain(self, value: Any) -> Any:
        """The same in Python's own strings, numbers, lists and dicts; messages without what is None in them."""
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, Mapping):
            plain = {key: self._plain(item) for key, item in value.items()}
            if "role" not in plain:
                return plain
            if self._own and isinstance(parts := plain.get("content"), list):
                plain["content"] = "".join(part.get("text", "") for part in parts if isinstance(part, dict))
            return {key: item for key, item in plain.items() if item is not None}
        if isinstance(value, list | tuple):
            return [self._plain(item) for item in value]
        raise MinisaError(f"messages: {shown(value)} in them: expected what JSON has, text, numbers, lists and objects")

    def _guarded(self, value: Any, guard: str, assistants: bool = False) -> Any:
        """The same with the guard behind the first character of whatever could be read as a special token."""
        if isinstance(value, list):
            return [self._guarded(item, guard, assistants) for item in value]
        if isinstance(value, dict):
            return {self._guarded(k, guard): self._guarded(item, guard, assistants) for k, item in value.items()}
        if not isinstance(value, str):
            return value
        allowed = _THOUGHTS if assistants else ()
        places = {found.start() for found in self._spelled.finditer(value) if found[1] not in allowed}
        for start in range(max(0, len(value) - max(map(len, self._names), default=0)), len(value)):
            if any(name.startswith(value[start:]) for name in self._names):
                places.add(start)
        return "".join(char + guard * (place in places) for place, char in enumerate(value)) if places else value

    @cached_property
    def _spelled(self) -> re.Pattern[str]:
        """Every place where a special token begins, in whatever case: a template may change that."""
        names = "|".join(map(re.escape, sorted(self._names, key=len, reverse=True)))
        return re.compile(f"(?=({names}))" if names else "(?!)", re.IGNORECASE)


def _append(message: dict[str, Any], text: str) -> bool:
    """Put text behind a message's content, or the last of its parts that is text; whether there was any."""
    if isinstance(message.get("content"), str):
        message["content"] += text
        return True
    parts = message.get("content")
    for part in reversed(parts if isinstance(parts, list) else []):
        if isinstance(part, dict) and isinstance(part.get("text"), str):
            part["text"] += text
            return True
    return False


class _Refused(TemplateError):
    """What raise_exception raises."""


def _raise_exception(message: str) -> None:
    raise _Refused(message)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)  # Jinja's own escapes for HTML


class _Generation(Extension):
    """{% generation %} … {% endgeneration %}, with which templates mark what the model is trained on."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own declaration)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Sandbox(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(("*", "**"))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Powers and long repetitions would take memory before anything is written."""
        number, other = (left, right) if isinstance(left, int) else (right, left)
        if operator == "**" or (hasattr(other, "__len__") and len(other) * number > MAX_PROMPT):
            raise SecurityError("it repeats too much")
        return super().call_binop(context, operator, left, right)
