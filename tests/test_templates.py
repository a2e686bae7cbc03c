"""Chat templates: those that are known give what Jinja makes of them, and those that differ are refused."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from minisa.errors import MinisaError
from minisa.text.chat_format import find_dialog
from minisa.text.dialog import DIALOGS, Message
from minisa.text.templates import Beyond, written
from minisa.text.tokenizer import load_tokenizer
from tests.vocabularies import CHATML, SPECIAL, jinja_writes, sentencepiece_model, write_json

SYSTEM: Message = {"role": "system", "content": "Be brief."}

# As published, shortened to what is said of a system prompt and turns of text.
_LOOP = "{% for message in messages %}"
_LLAMA2_TURNS = (
    "{% for message in loop_messages %}{% if loop.index0 == 0 and system_message %}{% set content = '<<SYS>>\\n' + "
    "system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}{% else %}{% set content = message['content'] %}"
    "{% endif %}{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
_LLAMA2_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message = "
    "messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% set system_message = DEFAULT %}{% endif %}"
)
_ZEPHYR_TURNS = "".join(
    "{% if message['role'] == 'ROLE' %}\n{{ '<|ROLE|>\n' + message['content'] + eos_token }}\n{% endif %}\n".replace(
        "ROLE", role
    )
    for role in ("system", "user", "assistant")
)
PUBLISHED = {
    "OpenHermes": ("chatml", CHATML),
    "Hermes 3": (
        "chatml",
        "{% if messages[0]['role'] != 'system' %}"
        "{{ \"<|im_start|>system\\nYou're a helpful assistant.<|im_end|>\\n\" }}{% endif %}" + CHATML,
    ),
    "LLaMA-Factory's ChatML": (
        "chatml",
        "{% set system_message = 'You are a \\'helpful\\' assistant.' %}{% if messages[0]['role'] == 'system' %}"
        "{% set system_message = messages[0]['content'] %}{% set messages = messages[1:] %}{% endif %}"
        "{{ '<|im_start|>system\\n' + system_message + '<|im_end|>\\n' }}" + CHATML,
    ),
    "Yi 1.5": (
        "yi-1.5",
        "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}{% endif %}" + _LOOP +
        "{% set content = message['content'] %}{% if message['role'] == 'user' %}{{ '<|im_start|>user\\n' + content + "
        "'<|im_end|>\\n<|im_start|>assistant\\n' }}{% elif message['role'] == 'assistant' %}{{ content + '<|im_end|>' "
        "+ '\\n' }}{% endif %}{% endfor %}",
    ),
    "Llama 3": (
        "llama3",
        "{{ bos_token }}" + _LOOP + "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ "
        "message['content'] | trim + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    ),
    "ChatML, all trimmed": ("chatml", CHATML.replace("message['content']", "message['content'] | trim")),
    "ChatML, a system prompt trimmed": (
        "chatml",
        "{% if messages[0].role == 'system' %}{{ '<|im_start|>system\n' + messages[0].content.strip() + '<|im_end|>\n' "
        "}}{% set messages = messages[1:] %}{% endif %}" + CHATML,
    ),
    "ChatML, thoughts forgotten": (
        "chatml",
        CHATML.replace("{{'<|im_start|>'", "{% set content = message.content %}{% if message.role == 'assistant' %}"
        "{% set content = content.split('</think>')[-1] %}{% endif %}{{'<|im_start|>'").replace(
            "message['content']", "content"),
    ),
    "Llama 2": ("llama2", _LLAMA2_SYSTEM.replace("DEFAULT", "false") + _LLAMA2_TURNS),
    "Vigogne": ("llama2", _LLAMA2_SYSTEM.replace("DEFAULT", "'Vous êtes Vigogne.\\nAidez.'") + _LLAMA2_TURNS),
    "Zephyr": (
        "zephyr",
        _LOOP + "\n" + _ZEPHYR_TURNS +
        "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_prompts_are_what_the_template_writes(name: str, tmp_path: Path) -> None:
    """Rendered by Jinja as transformers does, and held against the marks and texts of the layout.

    Spaces around a text too, which Llama 2's template and Meta's code take off at different places.
    """
    kind, template = PUBLISHED[name]
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model())
    write_json(tmp_path / "tokenizer_config.json", {"chat_template": template})
    dialog, tokenizer = find_dialog(tmp_path, load_tokenizer(tmp_path)), _Spelling(template)
    assert dialog.name == kind
    for around in ("{}", " {}\n ") if kind != "llama2" else ("{}",):
        roles = ("system", "user", "assistant", "user")
        talk = [{"role": role, "content": around.format(role.title())} for role in roles]
        talk[2]["content"] = around.format("<think>So.</think>Assistant")
        for messages in (talk[1:2], talk[1:], talk[:2], talk):
            expected = jinja_writes(template, messages)
            found = "".join(dialog.render(messages, tokenizer))
            assert found.removeprefix("<s>") == expected.removeprefix("<s>")
            assert written(template, messages, "<s>", "</s>") == expected


# As Llama 3.1, 3.2 and 3.3 have it but for their tools, of which some conditions stand here.
_LLAMA31 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if builtin_tools is defined or tools is not none %}
    {{- "Environment: ipython\\n" }}
{%- endif %}
{{- "Cutting Knowledge Date: December 2023\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""


_WITHOUT_DATE = re.sub(r'{{- "(Cutting|Today).*\n', "", _LLAMA31)


@pytest.mark.parametrize("template", [_LLAMA31, _LLAMA31.replace("strftime_now is defined", "false"), _WITHOUT_DATE])
def test_the_date_of_llama_3_1(template: str, tmp_path: Path) -> None:
    """The one that the template has where there is no clock; its turn is there without a system prompt too."""
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model())
    write_json(tmp_path / "tokenizer_config.json", {"chat_template": template})
    dialog, tokenizer = find_dialog(tmp_path, load_tokenizer(tmp_path)), _Spelling(template)
    assert dialog.name == "llama3"
    talk = [{"role": role, "content": f" {role.title()}\n"} for role in ("system", "user", "assistant", "user")]
    for messages in (talk[1:2], talk[1:], talk[:2], talk):
        expected = jinja_writes(template, messages).replace("%d %b %Y", "26 Jul 2024")
        assert "".join(dialog.render(messages, tokenizer)) == expected


class _Spelling:
    """In place of a tokenizer: ids are the text itself."""

    bos_id, add_bos = "<s>", True

    def __init__(self, template: str) -> None:
        self.chat_template = template
        self.special = {name: name for name in (*SPECIAL, "</s>")}

    def encode(self, text: str, *, mid_text: bool) -> list[str]:
        return [text]


@pytest.mark.parametrize(
    "template",
    [
        "<|user|>\n{{ x }}<|end|>",
        "{{ messages }}",
        "",
        # Tulu: the user's turn has no end
        "{{ '<|user|>\\n' + message['content'] + '\\n' }}{{ '<|assistant|>\\n'  + message['content'] + eos_token }}",
        # Phi-3
        "{{ '<|user|>\\n' + message['content'] + '<|end|>\\n' }}{{ '<|assistant|>\\n' }}{{ eos_token }}",
        # Phi-4
        "{{ '<|im_start|>user<|im_sep|>' + message['content'] + '<|im_end|><|im_start|>assistant<|im_sep|>' }}",
        # Llama Guard 3, Llama Guard
        "{{ bos_token }}<|start_header_id|>user<|end_header_id|>\n\nTask: Check if there is unsafe content in",
        "{{ bos_token }}{{ '[INST] Task: Check if there is unsafe content in ' }}{{ ' [/INST]' }}",
        # ChatML, but the answer begins with a thought; roles have other names; answers lose their thoughts; an end of
        # its own behind each turn; its system prompt is made of parts
        CHATML.replace("assistant\\n' }}{% endif", "assistant\\n<think>\\n' }}{% endif"),
        CHATML.replace("+ message['role'] +", "+ message['role'].replace('assistant', 'model') +"),
        CHATML.replace("message['content']", "message['content'].split('</think>')[-1].upper()"),
        # seen to write another prompt before it goes beyond what is followed
        CHATML.replace("assistant\\n' }}{% endif", "assistant\\n<think>\\n' }}{% endif").replace(
            "{{'<|im_start|>'",
            "{% if message['role'] == 'assistant' %}{% set x = message | tojson %}{% endif %}{{'<|im_start|>'",
        ),
        CHATML.replace("'<|im_end|>'", "'<|im_end|>' + eos_token"),
        "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\\nYou are ' + 'Sam.<|im_end|>\\n' }}{% endif %}"
        + CHATML,
        # [/INST] by another name; Smaug's first [INST] is the system prompt's
        "{{ bos_token }}{% for m in messages %}{{ '[INST] ' + m['content'] + ' [RESP] ' }}{% endfor %}",
        "{{ bos_token }}{% for m in messages %}{{ '[INST] ' if loop.last }}{{ m['content'] + ' [/INST]' }}{% endfor %}",
        # BOS once, not for each turn
        "{{ bos_token }}{{ '[INST] ' + '<<SYS>>\\n' + content + ' [/INST]' }}",
    ],
)
def test_a_template_that_is_refused(template: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model())
    write_json(tmp_path / "tokenizer_config.json", {"chat_template": template})
    with pytest.raises(MinisaError, match=r"its chat template (is none of chatml, .*|looks like .*): name a format"):
        find_dialog(tmp_path, load_tokenizer(tmp_path))


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% macro turn(m) %}{{ m }}{% endmacro %}{% for m in messages %}{{ turn(m.content) }}{% endfor %}", "Call"),
        ("{% for m in messages recursive %}{% endfor %}", "For"),
        ("{{ messages.__class__.__mro__ }}", "__mro__ of nothing"),
        ("{{ 'a' * 1000000000 }}", "Mul"),
        ("{% set x = 'aaaaaaaa' %}" + "{% set x = x + x %}" * 60, "it takes too long"),
        ("{% for a in range(999) %}{% for b in range(999) %}{% endfor %}{% endfor %}", "it takes too long"),
        ("".join(f"{{% set a{i}=1 %}}" for i in range(3000)) + "{% for i in range(999) %}{% endfor %}", "too long"),
        ("{% for a in range(999) %}{{ '" + "x" * 999 + "' }}{% endfor %}", "it writes too much"),
        ("{{ range(1, 5000) }}", "a long range"),
        ("{% set x = 0x" + "f" * 9999 + " %}{{ x % 7 }}", "a number of so many digits"),
        ("{% set x = 0x7fffffffffffffff %}{{ x + x }}", "a number of so many digits"),
        ("{{ 'x%s' % 7 }}", "a text's remainder"),
        ("{{ 'x'.strip('" + "y" * 99 + "') }}", "strip"),
        ("{{ 'x'.replace('x', '" + "y" * 9999 + "').replace('y', '" + "z" * 9999 + "') }}", "replace"),
        ("{{ ' x '|trim(chars=' x') }}", "arguments by name"),
        ("{{ 'a,b'.split(sep=',')[0] }}", "arguments by name"),
        ("{{ 'a,b'.split(*[',']) }}", "arguments in a list"),
        ("{% set x = [1] %}" + "{% set x = [x, x] %}" * 60 + "{{ x }}", "a list of lists"),
        ("{% set x = namespace(a=1) %}{% set x.a = x %}{{ x }}", "a list of lists"),
        ("{{ messages }}", "a list as text"),
        ("{{ 1 % 0 }}", "zero"),
        ("{{ messages ! }}", "unexpected char"),
        ("{{ " + "(" * 9999, "recursion"),
        (" " * (1 << 17), "its length"),
    ],
)
def test_a_template_that_is_not_followed(template: str, reason: str, tmp_path: Path) -> None:
    """It runs nothing, and gives up before it takes long; its marks decide."""
    began = time.perf_counter()
    with pytest.raises(Beyond, match=reason):
        written(template, [SYSTEM], "<s>", "</s>")
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model())
    write_json(tmp_path / "tokenizer_config.json", {"chat_template": template + "{# <|im_start|> #}"})
    assert find_dialog(tmp_path, load_tokenizer(tmp_path)).name == "chatml"
    assert time.perf_counter() - began < 5


@pytest.mark.parametrize(
    "repeated", ['\\"<|im_start|>system\\n', "set system_message = '", "set system_", "bos_token ", "\\"]
)
def test_a_megabyte_of_a_template_takes_no_time(repeated: str) -> None:
    template = "<|im_start|>" + repeated * ((1 << 20) // len(repeated))
    began = time.perf_counter()
    assert DIALOGS["chatml"].render([SYSTEM, {"role": "user", "content": "Hi"}], _Spelling(template))
    assert DIALOGS["chatml"].render([{"role": "user", "content": "Hi"}], _Spelling(template))
    assert time.perf_counter() - began < 5
