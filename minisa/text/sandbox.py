"""jinja2's sandbox, set up as transformers sets it up for chat templates: they are programs out of files."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_PROMPT = 1 << 24  # characters


class Refused(TemplateError):
    """What a template raises by raise_exception."""


def compile_template(source: str, clock: datetime.datetime) -> Callable[[Mapping[str, Any]], str]:
    """A function from a template's variables to its text. Both may raise anything; clock: what it takes for now."""
    sandbox = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    sandbox.filters["tojson"] = partial(json.dumps, ensure_ascii=False)  # Jinja's own escapes HTML
    sandbox.globals |= {"raise_exception": _raise_exception, "strftime_now": clock.strftime}
    template = sandbox.from_string(source)

    def render(variables: Mapping[str, Any]) -> str:
        texts, length = [], 0
        for text in template.generate(variables):
            length += len(text)
            if length > MAX_PROMPT:
                raise SecurityError(f"it writes more than {MAX_PROMPT} characters")
            texts.append(text)
        return "".join(texts)

    return render


def _raise_exception(message: str) -> NoReturn:
    raise Refused(message)


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
