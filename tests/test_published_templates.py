"""Chat prompts of published templates, id for id as transformers has them, and of our own, as the makers have them."""

from __future__ import annotations

import ast
import datetime
import functools
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from minisa.checkpoint.gguf import read_gguf
from minisa.text.chat import CLOCK, ChatTemplate, Message, find_template
from minisa.text.tokenizer import Tokenizer, load_tokenizer
from tests.makers_ids import CHAT_IDS
from tests.vocabularies import (
    PACKAGE_FILES,
    SYSTEM,
    TALK,
    llama2_json,
    load_real,
    write_json,
)

# Published templates, and the tokenizers to try them with. Those with a name are in unsloth's chat_templates.py.
UNSLOTH = ("pip", "unsloth", "2026.10.9", "unsloth/chat_templates.py")
PUBLISHED = {
    "SmolLM2": (None, "smollm2"),
    "Llama 3.2": (None, "llama3.2.json"),
    "Mistral Nemo": (None, "nemo.json"),
    "Llama 3.1": ("llama31_template", "llama3.2.json"),
    "Qwen 2.5": ("qwen25_template", "smollm2"),
    "Qwen 3": ("qwen3_template", "smollm2"),
    "Phi-4": ("phi4_template", "llama3.2.json"),
    "Gemma 3": ("gemma3_template", "nemo.json"),
    "ChatML": ("chatml_template", "yi.json"),
    "Llama 2": ("llama_template", "llama2"),
    "Mistral v1": ("mistral_template", "llama2"),
    "Zephyr": ("zephyr_template", "llama2"),
    "Vicuna": ("vicuna_template", "llama2"),
    "Alpaca": ("alpaca_template", "llama2"),
}
HARD = (
    *(" ", "  ", "\n", "\n\n", "\t", "\r\n", "\u200b", "\xa0", "a", "The cat", " 12345.6", "e\u0301", "日本語"),
    *("👩‍👩‍👧", "٣", "<", ">", "</div>", "<b>", "[x]", "[", "{{ x }}", "{% if %}", '"', "\\n", "'s"),
    *("<|", "|>", "</", "ſ", "\u2800"),
)  # fmt: skip


def hard_text(chance: random.Random) -> str:
    return "".join(chance.choices(HARD, k=chance.randint(1, 9)))


def hard_talk(chance: random.Random) -> list[Message]:
    """A system prompt or none, user and assistant in turn; the last message is either's."""
    messages = [{"role": "system", "content": hard_text(chance)}] if chance.random() < 0.5 else []
    for _ in range(chance.randint(1, 4)):
        thought = f"<think>\n{hard_text(chance)}\n</think>\n\n" if chance.random() < 0.2 else ""
        messages.append({"role": "user", "content": hard_text(chance)})
        messages.append({"role": "assistant", "content": thought + hard_text(chance)})
    return messages if chance.random() < 0.25 else messages[:-1]


@pytest.fixture(scope="module")
def unsloth(package_file: Callable[..., Path]) -> Mapping[str, str]:
    """The templates in a Python file, which is only parsed."""
    module = ast.parse(package_file(*UNSLOTH).read_text(encoding="utf-8"))
    return {
        target.id: value
        for node in ast.walk(module)
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        for target, value in [(node.targets[0], node.value.value)]
        if isinstance(target, ast.Name) and isinstance(value, str)
    }


@functools.cache
def both_tokenizers(file: Path) -> tuple[Tokenizer, Any]:
    """Ours, and transformers' of the same vocabulary."""
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    ours = load_tokenizer(file)
    if file.suffix == ".gguf":  # SmolLM2
        metadata = read_gguf(file).metadata
        vocab = {token: i for i, token in enumerate(metadata["tokenizer.ggml.tokens"])}
        merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
        peer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges))
        steps = tokenizers.pre_tokenizers
        digits, byte_level = steps.Digits(individual_digits=True), steps.ByteLevel(add_prefix_space=False)
        peer.pre_tokenizer = steps.Sequence([digits, byte_level])
        peer.add_special_tokens(list(ours.special))
    else:
        peer = tokenizers.Tokenizer.from_file(str(file))
    return ours, transformers.PreTrainedTokenizerFast(tokenizer_object=peer, **ours.named)


def tokenizer_file(name: str, request: pytest.FixtureRequest, folder: Path) -> Path:
    package_file = request.getfixturevalue("package_file")
    if name == "smollm2":
        return request.getfixturevalue("smollm2_path")
    if name == "llama2":
        script = package_file(*PACKAGE_FILES[name]).read_text(encoding="utf-8")
        return write_json(folder / "tokenizer.json", llama2_json(script))
    return package_file(*PACKAGE_FILES[name])


@pytest.mark.parametrize("name", PUBLISHED)
def test_transformers_ids(
    name: str, unsloth: Mapping[str, str], request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Of hard texts that spell no special token, and of answers to be continued."""
    source, vocabulary = PUBLISHED[name]
    folder = tmp_path_factory.getbasetemp()
    ours, peer = both_tokenizers(tokenizer_file(vocabulary, request, folder))
    template = ours.chat_template if source is None else unsloth[source]
    assert template is not None
    chat = ChatTemplate(name, template, ours, clock=datetime.datetime.now())
    chance = random.Random(name)
    for _ in range(20):
        messages = hard_talk(chance)
        continues = messages[-1]["role"] == "assistant"
        how = {"add_generation_prompt": not continues, "continue_final_message": continues, "return_dict": False}
        assert chat.ids(messages) == peer.apply_chat_template(messages, chat_template=template, **how), messages


TOOL = {"name": "weather", "description": "Of a <town>", "parameters": {"type": "object", "properties": {}}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"town": "Łódź </b>"}}, "id": "123456789"}
TOOLS_TALK: list[Message] = [
    {"role": "user", "content": "Is it cold?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": '{"celsius": -3}', "name": "weather", "tool_call_id": "123456789"},
]


@pytest.mark.parametrize("name", ["Llama 3.2", "Mistral Nemo", "Llama 3.1", "Qwen 2.5"])
def test_tools(
    name: str, unsloth: Mapping[str, str], request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Schemas, calls without any text, and results."""
    source, vocabulary = PUBLISHED[name]
    ours, peer = both_tokenizers(tokenizer_file(vocabulary, request, tmp_path_factory.getbasetemp()))
    template = ours.chat_template if source is None else unsloth[source]
    assert template is not None
    tools = [{"type": "function", "function": TOOL}]
    chat = ChatTemplate(name, template, ours, clock=datetime.datetime.now())
    how = {"add_generation_prompt": True, "return_dict": False, "chat_template": template}
    assert chat.ids(TOOLS_TALK, tools) == peer.apply_chat_template(TOOLS_TALK, tools=tools, **how)


def test_content_in_parts(unsloth: Mapping[str, str], request: pytest.FixtureRequest) -> None:
    ours, peer = both_tokenizers(tokenizer_file("nemo.json", request, Path()))
    parts: list[Message] = [
        {"role": "user", "content": [{"type": "text", "text": "What is "}, {"type": "text", "text": "this?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "I think it "}]},
    ]
    template = unsloth["gemma3_template"]
    for messages, how in ((parts[:1], "add_generation_prompt"), (parts, "continue_final_message")):
        expected = peer.apply_chat_template(messages, chat_template=template, return_dict=False, **{how: True})
        assert ChatTemplate("Gemma 3", template, ours).ids(messages) == expected


@pytest.mark.parametrize("name", CHAT_IDS)
def test_the_makers_ids(name: str, request: pytest.FixtureRequest) -> None:
    vocabulary, expected = CHAT_IDS[name]
    talk = [{**message, "content": message["content"].replace(" </s>", "")} for message in TALK]
    messages = [SYSTEM, *(talk if name == "zephyr" else TALK)]
    in_parts = [{**m, "content": [{"type": "text", "text": part} for part in m["content"]]} for m in messages]
    chat = find_template("", load_real(vocabulary, request), name.split()[0])
    assert chat.ids(messages) == expected
    assert chat.ids(in_parts) == expected
    answer = {"role": "assistant", "content": "It is"}
    assert chat.ids([*messages, answer])[: len(expected)] == expected  # the answer goes on from the prompt


def test_the_clock_stands_still(request: pytest.FixtureRequest) -> None:
    tokenizer = load_real("llama3.2.json", request)
    assert f"Today Date: {CLOCK:%d %b %Y}" in tokenizer.decode(find_template("llama3.2", tokenizer).ids(TALK))
