"""Which chat format a model was trained on.

The marks in its chat template name one; then the template is followed for four dialogs and held against that format's
own prompts, since a few words in it make another prompt.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

from minisa.errors import MinisaError
from minisa.text.dialog import BOS, BOS_IF_ADDED, DIALOGS, ROLES, Dialog, Message, Text
from minisa.text.templates import Beyond, Refused, written
from minisa.text.tokenizer import Tokenizer

# What Mistral publishes at Hugging Face with no tokenizer but tekken.json are instruct models without a template.
_TEKKEN_ALONE = {"params.json", "config.json", "tekken.json"}
_LAYOUT = (*_TEKKEN_ALONE, "tokenizer_config.json", "tokenizer.json")
_MAKERS_MARKS = ("<|start_header_id|>", "[MODEL_SETTINGS]", "[SYSTEM_PROMPT]", "[INST]")  # the second: no format known

_TALK = (*zip(ROLES, ("Be brief.", "Hi!", "<think>\nHm.\n</think>\n\nHello."), strict=True), ("user", "2+2?"))
_LLAMA3_SYSTEM = re.compile(r"<\|start_header_id\|>system<\|end_header_id\|>\n\n([^<]*)<\|eot_id\|>")
_TRIMS = [frozenset(roles) for count in range(4) for roles in itertools.combinations(ROLES, count)]


def find_dialog(path: str | Path, tokenizer: Tokenizer) -> Dialog:
    """The chat format of the model at a path, by its chat template; `raw` for a model that comes without one.

    Meta's and Mistral's own layouts have no place for a template: there the vocabulary's special tokens decide.
    Raises MinisaError when the template is none of those known here, or only looks like one.
    """
    template, special = tokenizer.chat_template, tokenizer.special
    if template is None:
        there = {name for name in _LAYOUT if (Path(path) / name).is_file()}
        makers_own = "params.json" in there and ("config.json" not in there or there == _TEKKEN_ALONE)
        marks = [mark for mark in _MAKERS_MARKS if mark in special]
        if not (makers_own and marks):
            return DIALOGS["raw"]
        template = marks[0]
    known = _format_of(template, special)
    dialog, wrong = None, f"is none of {', '.join(DIALOGS)}"
    if known is not None:
        dialog, wrong = DIALOGS[known], f"looks like {known}'s and writes other prompts"
        if tokenizer.chat_template is not None:
            dialog = _as_written(template, dialog, tokenizer)
    if dialog is None:
        raise MinisaError(
            f"{path}: its chat template {wrong}: name a format (--chat-format) or take plain text (--raw)"
        )
    return dialog


def _as_written(template: str, dialog: Dialog, tokenizer: Tokenizer) -> Dialog | None:
    """The format with what else a template does: texts trimmed, thoughts forgotten, BOS, the date before a system
    prompt. None where its prompts are others.

    Where Mistral's own code and its template differ, the code counts: the template has other spaces, system prompts at
    other places, and one to fall back on. A template's clock is not followed: Llama 3.2's writes 26 Jul 2024 without
    one, as Llama 3.1's and 3.3's always do, and a prompt does not change overnight. Of a template that cannot be
    followed its marks have to do.
    """
    names: dict[int | None, str] = {token_id: name for name, token_id in tokenizer.special.items()}
    bos, eos = (names.get(token_id, "") for token_id in (tokenizer.bos_id, tokenizer.eos_id))
    mistral = dialog.name.startswith("mistral")
    around = "{}" if mistral or dialog.name == "llama2" else " {} \n"
    talk = [{"role": role, "content": around.format(content)} for role, content in _TALK]

    def compared(text: str) -> str:
        return "".join(text.split()) if mistral else text

    trials = []
    for messages in (talk[1:2], talk[1:], talk[:2], talk):
        system = messages[0]["role"] == "system"
        if mistral and system != (dialog.name == "mistral-v7"):
            continue
        try:
            trials.append((messages, compared(written(template, messages, bos, eos))))
        except Beyond:
            break
        except Refused:
            if not system:
                return None
    if not trials:
        return dialog
    befores = (None, *_LLAMA3_SYSTEM.findall(trials[0][1])[:1])
    for trims, forgets, before in itertools.product(_TRIMS, (False, True), befores):
        variant = replace(dialog, trims=trims, forgets_thoughts=forgets, before_system=before)
        pairs = [(found, compared(_spelled(variant, messages, template, bos))) for messages, found in trials]
        if all(text in (found, found.removeprefix(bos), bos + found) for found, text in pairs):
            return replace(variant, begins=any(found == bos + text != text for found, text in pairs))
    return None


def _spelled(dialog: Dialog, messages: Sequence[Message], template: str, bos: str) -> str:
    """The prompt with its tokens spelled out."""
    marks = {BOS.name: bos, BOS_IF_ADDED.name: ""}
    parts = dialog.parts(messages, template)
    return "".join(part.text if isinstance(part, Text) else marks.get(part.name, part.name) for part in parts)


def _format_of(template: str, special: Collection[str]) -> str | None:
    """The name of the format that a template writes; None where it has markers or text that the format has not."""
    if "<|im_start|>" in template:
        if set(re.findall(r"<\|im_\w+\|>", template)) - {"<|im_start|>", "<|im_end|>"}:
            return None  # Phi-4's <|im_sep|>
        if "<|im_end|>" in template and not re.search(r"<\|im_start\|>(?:system|['\"{])", template):
            return "yi-1.5"
        return "chatml"
    if "<|start_header_id|>" in template:  # Llama Guard has its task written out behind the user's header
        return None if re.search(r"<\|end_header_id\|>(?:\n|\\n){2}\w", template) else "llama3"
    if "[INST]" in template or "[SYSTEM_PROMPT]" in template:
        if re.search(r"\[INST\] \w", template):
            return None  # Llama Guard 1
        if "[SYSTEM_PROMPT]" in template:
            return "mistral-v7"
        if "<<SYS>>" in template:
            return "llama2" if re.search(r"(?:bos_token|['\"]<s>['\"]) *\+ *['\"]\[INST\] ", template) else None
        return "mistral-v3" if "[INST]" in special else "mistral-v1"
    if re.search(r"<\|user\|>(?:\n|\\n)['\"] *\+ *message(?:\['content'\]|\.content) *\+ *eos_token", template):
        return "zephyr"  # in Tulu's and Phi-3's the user's turn has another end
    return None
