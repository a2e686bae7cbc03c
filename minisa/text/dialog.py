"""Chat prompts: messages to token ids, in the format each model was trained on.

Special tokens go in by their ids and text as plain text, so no text can forge a role. In two old formats the
markers are text themselves; there a message that spells one is refused, as Meta's own code does. Where a template
leaves BOS to the tokenizer (ChatML, Zephyr), it comes first if that puts it before plain text.

A longer dialog's ids begin with those of the shorter one, so what the KV cache holds stays good. The one exception
is the makers': Mistral's v2 and v3 put the system prompt into the last user message.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from minisa.errors import MinisaError, shown
from minisa.text.tokenizer import Tokenizer

Message = Mapping[str, str]  # {"role": "system" | "user" | "assistant", "content": text}

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True)
class Mark:
    """A special token, by name."""

    name: str


@dataclass(frozen=True, slots=True)
class Text:
    """Plain text, encoded by itself. mid_text: it goes on from the text before it."""

    text: str
    mid_text: bool = False


Part = Mark | Text
Layout = Callable[[Sequence[Message]], Iterator[Part]]

BOS = Mark("BOS")
BOS_IF_ADDED = Mark("BOS, if the tokenizer puts it before plain text or the template does")
EOS = Mark("</s>")


@dataclass(frozen=True, slots=True)
class Dialog:
    """A chat format.

    layout: messages to the parts of a prompt that ends where the assistant's answer begins.
    opens: the special token that opens a turn, if one does.
    alternating: after an optional system message come user, assistant, user, … and nothing else.
    reserved: markers that are plain text in this format, so that no message may spell them.
    defaults: where the model's template falls back on a system prompt, that stands in for a missing one.
    trims, forgets_thoughts, begins, before_system: as the model's template has it, the roles whose texts lose the
        spaces around them; whether answers lose what ends with </think>; True where it writes BOS, whatever the
        tokenizer does; and the text before any system prompt, in a turn that is there without one too (None: no such).
    free: any messages, in any order; otherwise the last one is the user's.
    """

    name: str
    layout: Layout
    opens: str | None = None
    alternating: bool = False
    reserved: tuple[str, ...] = ()
    defaults: bool = False
    free: bool = False
    trims: frozenset[str] = frozenset()
    forgets_thoughts: bool = False
    begins: bool = False
    before_system: str | None = None

    def render(self, messages: Sequence[Message], tokenizer: Tokenizer) -> list[int]:
        """The prompt's ids, the header that opens the assistant's turn included.

        Raises MinisaError for messages that the format has no place for, and for a vocabulary without its tokens.
        """
        self._check(messages)
        template = tokenizer.chat_template or ""
        ids: list[int] = []
        for part in self.parts(messages, template):
            if isinstance(part, Text):
                ids += tokenizer.encode(part.text, mid_text=part.mid_text)
            elif part is not BOS_IF_ADDED or self.begins or tokenizer.add_bos:
                ids.append(self._mark_id(part, tokenizer))
        return ids

    def parts(self, messages: Sequence[Message], template: str) -> Iterator[Part]:
        """The prompt in parts, with the template's system prompt where there is none."""
        system, turns = _system_apart([{**message, "content": self._content(message)} for message in messages])
        if system is None and self.defaults:
            system = _default_system(template)
        if self.before_system is not None:
            system = self.before_system + (system or "")
        return self.layout(turns if system is None else [{"role": "system", "content": system}, *turns])

    def _content(self, message: Message) -> str:
        role, text = message["role"], message["content"]
        if self.forgets_thoughts and role == "assistant":
            text = text.rpartition("</think>")[2]
        return text.strip() if role in self.trims else text

    def stop_ids(self, tokenizer: Tokenizer) -> frozenset[int]:
        """The tokens that end the assistant's turn: those that say so, and the one that opens another turn."""
        opens = () if self.opens is None else (self._mark_id(Mark(self.opens), tokenizer),)
        return tokenizer.eos_ids.union(opens)

    def _mark_id(self, mark: Mark, tokenizer: Tokenizer) -> int:
        token_id = tokenizer.bos_id if mark in (BOS, BOS_IF_ADDED) else tokenizer.special.get(mark.name)
        if token_id is None:
            raise MinisaError(f"the {self.name} chat format needs the token {mark.name}: the vocabulary has none")
        return token_id

    def _check(self, messages: Sequence[Message]) -> None:
        if not isinstance(messages, Sequence) or isinstance(messages, str):
            raise MinisaError(f"messages is {shown(messages)}: expected a list of them")
        if not messages:
            raise MinisaError("messages: the list is empty: expected at least one message")
        for number, message in enumerate(messages):
            self._check_message(f"messages[{number}]", message)
        roles = [message["role"] for message in messages]
        if not self.free and roles[-1] != "user":
            raise MinisaError(f"messages: the last one is the {roles[-1]}'s: expected the user's, to be answered")
        turns = roles[1:] if roles[0] == "system" else roles
        if self.alternating and turns != ["user", "assistant"] * (len(turns) // 2) + ["user"]:
            raise MinisaError(
                f"messages: the {self.name} chat format has system (or not), user, assistant, user, …: "
                f"found {', '.join(roles[:9])}"
            )

    def _check_message(self, where: str, message: Any) -> None:
        role, content = (message.get("role"), message.get("content")) if isinstance(message, Mapping) else (None, None)
        if role not in ROLES:
            raise MinisaError(f"{where}: role {role!r} is unknown: expected {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise MinisaError(f"{where}: content is {content!r}: expected a string")
        if role == "user" and not content:
            raise MinisaError(f"{where}: the user's message is empty: give some text")
        marker = next((marker for marker in self.reserved if marker in content), None)
        if marker is not None and role != "assistant":
            raise MinisaError(f"{where}: the text spells {marker}, a marker of the {self.name} format: reword it")


_LITERAL = r"(?P<quote>['\"])%s(?P<text>(?:(?!(?P=quote))[^\\<]|\\.)+)%s"
_DEFAULTS = (
    _LITERAL % (r"<\|im_start\|>system(?:\n|\\n)", r"<\|im_end\|>"),
    r"<\|im_start\|>system(?:\n|\\n)(?P<text>[^<>{}'\"]+)<\|im_end\|>",
    r"set \w*system_(?:message|prompt) *= *" + _LITERAL % ("", r"(?P=quote) *-?%}"),
)


def _default_system(template: str) -> str | None:
    """The system prompt that a template has written out in itself, for dialogs without one."""
    if "false == true" in template:  # how transformers wrote into Llama 2's that its default is not used
        return None
    found = next(filter(None, (re.search(pattern, template) for pattern in _DEFAULTS)), None)
    if found is None:
        return None
    return re.sub(r"\\(.)", lambda escape: {"n": "\n", "t": "\t"}.get(escape[1], escape[1]), found["text"])


def _chatml(messages: Sequence[Message]) -> Iterator[Part]:
    start, end = Mark("<|im_start|>"), Mark("<|im_end|>")
    yield BOS_IF_ADDED
    for message in messages:
        yield start
        if message["role"] == "assistant":  # apart from its header, as it was generated
            yield Text("assistant\n")
            yield Text(message["content"], mid_text=True)
        else:
            yield Text(f"{message['role']}\n{message['content']}")
        yield end
        yield Text("\n")
    yield start
    yield Text("assistant\n")


def _yi(messages: Sequence[Message]) -> Iterator[Part]:
    """Yi 1.5's ChatML: the system prompt stands before it all, as plain text."""
    system, turns = _system_apart(messages)
    first, *rest = _chatml(turns)
    yield first
    if system:
        yield Text(system)
    yield from rest


def _llama3(messages: Sequence[Message]) -> Iterator[Part]:
    """As in Meta's llama_models, chat_format.py, which trims nothing and puts in no date."""

    def header(role: str) -> Iterator[Part]:
        yield Mark("<|start_header_id|>")
        yield Text(role)
        yield Mark("<|end_header_id|>")
        yield Text("\n\n")

    yield BOS
    for message in messages:
        yield from header(message["role"])
        yield Text(message["content"])
        yield Mark("<|eot_id|>")
    yield from header("assistant")


def _llama2(messages: Sequence[Message]) -> Iterator[Part]:
    """As in Meta's llama, generation.py."""
    system, turns = _system_apart(messages)
    for number, message in enumerate(turns):
        content = message["content"]
        if message["role"] == "assistant":
            yield Text(f" {content.strip()} ", mid_text=True)
            yield EOS
            continue
        if number == 0 and system is not None:
            content = f"<<SYS>>\n{system}\n<</SYS>>\n\n{content}"
        yield BOS
        yield Text(f"[INST] {content.strip()} [/INST]")


def _mistral_v1(messages: Sequence[Message]) -> Iterator[Part]:
    """As in mistral_common, InstructTokenizerV1: [INST] is text, every message is a text of its own."""
    system, turns = _system_apart(messages)
    yield BOS
    for number, message in enumerate(turns):
        content = message["content"]
        if message["role"] == "assistant":
            yield Text(content)
            yield EOS
            continue
        if number == 0 and system:
            content = f"{system}\n\n{content}"
        yield Text(f"[INST] {content} [/INST]")


def _mistral_v3(messages: Sequence[Message]) -> Iterator[Part]:
    """As in mistral_common, InstructTokenizerV2 and V3, which differ in tools only; sentencepiece or tekken."""
    system, turns = _system_apart(messages)
    yield BOS
    if system:
        last = turns[-1]
        turns = [*turns[:-1], {**last, "content": f"{system}\n\n{last['content']}"}]
    yield from _mistral_turns(turns)


def _mistral_v7(messages: Sequence[Message]) -> Iterator[Part]:
    """As in mistral_common, InstructTokenizerV7 and later: the system prompt has a place of its own."""
    system, turns = _system_apart(messages)
    yield BOS
    if system is not None:
        yield Mark("[SYSTEM_PROMPT]")
        yield Text(system)
        yield Mark("[/SYSTEM_PROMPT]")
    yield from _mistral_turns(turns)


def _mistral_turns(turns: Sequence[Message]) -> Iterator[Part]:
    for message in turns:
        if message["role"] == "assistant":
            yield Text(message["content"].rstrip(" "))
            yield EOS
        else:
            yield Mark("[INST]")
            yield Text(message["content"])
            yield Mark("[/INST]")


def _zephyr(messages: Sequence[Message]) -> Iterator[Part]:
    """Headers are text, but a turn ends with a special token, which text cannot spell."""
    yield BOS_IF_ADDED
    newline = ""
    for message in messages:
        header = f"{newline}<|{message['role']}|>\n"
        newline = "\n"
        if message["role"] == "assistant":
            yield Text(header)
            yield Text(message["content"], mid_text=True)
        else:
            yield Text(header + message["content"])
        yield EOS
    yield Text("\n<|assistant|>\n")


def _raw(messages: Sequence[Message]) -> Iterator[Part]:
    """No format: the messages' texts, one after the other."""
    yield BOS_IF_ADDED
    for number, message in enumerate(messages):
        yield Text(message["content"], mid_text=number > 0)


def _system_apart(messages: Sequence[Message]) -> tuple[str | None, Sequence[Message]]:
    if messages[0]["role"] == "system":
        return messages[0]["content"], messages[1:]
    return None, messages


DIALOGS: dict[str, Dialog] = {
    dialog.name: dialog
    for dialog in (
        Dialog("chatml", _chatml, opens="<|im_start|>", defaults=True),
        Dialog(
            "llama2", _llama2, alternating=True, reserved=("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"), defaults=True
        ),
        Dialog("llama3", _llama3, opens="<|start_header_id|>", defaults=True),
        Dialog("mistral-v1", _mistral_v1, alternating=True, reserved=("[INST]", "[/INST]")),
        Dialog("mistral-v2", _mistral_v3, opens="[INST]", alternating=True),
        Dialog("mistral-v3", _mistral_v3, opens="[INST]", alternating=True),
        Dialog("mistral-v7", _mistral_v7, opens="[INST]", alternating=True),
        Dialog("zephyr", _zephyr, defaults=True),
        Dialog("yi-1.5", _yi, opens="<|im_start|>", alternating=True),
        Dialog("raw", _raw, free=True),
    )
}
