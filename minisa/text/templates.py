"""What a chat template writes for a given dialog.

A template is a program out of a file: jinja2 parses it and runs none of it. What is followed here is what such programs
use to write turns of text, in bounded steps; no way leads from it to anything of Python's.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jinja2 import Environment, TemplateError, nodes
from jinja2.ext import loopcontrols

_MAX_TEXT = 1 << 16  # characters of a template, of what it writes, and of a replaced text; the makers' have 20,000
_MAX_STEPS = 50_000  # and 64 characters of a value are one more
_MAX_RANGE = 1000
_MAX_ARGUMENT = 64  # characters that strip looks for, each at every end

_SYNTAX = Environment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])  # transformers' settings


class _Undefined:
    """The value of a name that nobody gave: false, and no text."""

    def __bool__(self) -> bool:
        return False

    def __str__(self) -> str:
        return ""


_UNDEFINED = _Undefined()

_METHODS = {"strip", "lstrip", "rstrip", "startswith", "endswith", "split", "replace", "upper", "lower", "title"}
_FILTERS = {"trim": "strip", "upper": "upper", "lower": "lower", "capitalize": "capitalize", "title": "title"}
_TESTS = {
    "defined": lambda value: value is not _UNDEFINED,
    "undefined": lambda value: value is _UNDEFINED,
    "none": lambda value: value is None,
    "string": lambda value: isinstance(value, str),
    "mapping": lambda value: isinstance(value, dict),
    "iterable": lambda value: isinstance(value, str | list | dict),
    "sequence": lambda value: isinstance(value, str | list | dict),
    "boolean": lambda value: isinstance(value, bool),
    "true": lambda value: value is True,
    "false": lambda value: value is False,
}
_COMPARE = {
    "eq": lambda left, right: left == right,
    "ne": lambda left, right: left != right,
    "lt": lambda left, right: left < right,
    "lteq": lambda left, right: left <= right,
    "gt": lambda left, right: left > right,
    "gteq": lambda left, right: left >= right,
    "in": lambda left, right: right is not _UNDEFINED and left in right,
    "notin": lambda left, right: right is _UNDEFINED or left not in right,
}


class Refused(Exception):
    """The template has no place for the dialog: it calls raise_exception."""


class Beyond(Exception):
    """The template goes beyond what is followed here, or on for too long."""


def written(template: str, messages: Sequence[Mapping[str, str]], bos: str, eos: str) -> str:
    """The prompt, as text; bos, eos: what it calls bos_token and eos_token. Raises Refused and Beyond."""
    try:
        if len(template) > _MAX_TEXT:
            raise ValueError("its length")
        writer = _Writer({"bos_token": bos, "eos_token": eos, "add_generation_prompt": True, "tools": None})
        writer.names["messages"] = [dict(message) for message in messages]
        writer.follow(_parsed(template).body)
        return "".join(writer.texts)
    except (
        ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, TemplateError, TypeError, ValueError
    ) as error:  # fmt: skip
        raise Beyond(str(error)) from None


@functools.lru_cache(1)
def _parsed(template: str) -> nodes.Template:
    return _SYNTAX.parse(template)


class _Namespace(dict[str, Any]):
    """What namespace() makes, and the variable loop: never inside another value, so that none is deep."""


class _Writer:
    """names: the variables. texts: what has been written."""

    def __init__(self, names: dict[str, Any]) -> None:
        self.names = names
        self.texts: list[str] = []
        self._steps = self._written = 0

    def follow(self, body: Iterable[nodes.Node]) -> None:
        for node in body:
            self._step()
            match node:
                case nodes.Output():
                    for part in node.nodes:
                        text = part.data if isinstance(part, nodes.TemplateData) else _text(self._value(part))
                        self._written += len(text)
                        if self._written > _MAX_TEXT:
                            raise ValueError("it writes too much")
                        self.texts.append(text)
                case nodes.If():
                    branches = [(node.test, node.body), *((other.test, other.body) for other in node.elif_)]
                    self.follow(next((body for test, body in branches if self._value(test)), node.else_))
                case nodes.For(target=nodes.Name(name=name), test=None, else_=[], recursive=False):
                    self._loop(name, self._value(node.iter), node.body)
                case nodes.Assign(target=nodes.Name(name=name)):
                    self.names[name] = self._value(node.node)
                case nodes.Assign(target=nodes.NSRef(name=name, attr=attribute)):
                    self.names[name][attribute] = _inner(self._value(node.node))
                case nodes.Macro():  # no good unless it is called, and that is not followed
                    pass
                case _:
                    raise ValueError(type(node).__name__)

    def _loop(self, name: str, items: Any, body: list[nodes.Node]) -> None:
        items = [] if items is _UNDEFINED else list(items)
        outside = self.names
        for index, item in enumerate(items):
            self._step(64 * len(outside))
            loop = _Namespace(index0=index, index=index + 1, first=index == 0, last=index == len(items) - 1)
            loop |= {"length": len(items), "previtem": items[index - 1] if index else _UNDEFINED}
            loop |= {"nextitem": items[index + 1] if index + 1 < len(items) else _UNDEFINED}
            self.names = {**outside, name: item, "loop": loop}  # what is set inside is lost behind
            self.follow(body)
        self.names = outside

    def _step(self, size: int = 0) -> None:
        self._steps += 1 + size // 64
        if self._steps > _MAX_STEPS:
            raise ValueError("it takes too long")

    def _value(self, node: Any) -> Any:
        self._step()
        value = self._evaluated(node)
        self._step(len(value) if isinstance(value, str | list) else 0)
        if isinstance(value, int) and value.bit_length() > 63:
            raise ValueError("a number of so many digits")
        return value

    def _evaluated(self, node: Any) -> Any:
        value = self._value
        match node:
            case nodes.Filter() | nodes.Test() | nodes.Call() if node.dyn_args or node.dyn_kwargs:
                raise ValueError("arguments in a list")
            case (
                nodes.Filter(kwargs=[_, *_])
                | nodes.Test(kwargs=[_, *_])
                | nodes.Call(node=nodes.Getattr(), kwargs=[_, *_])
            ):
                raise ValueError("arguments by name")
            case nodes.Const():
                return node.value
            case nodes.Name():
                return self.names.get(node.name, _UNDEFINED)
            case nodes.Getattr():
                return _item(value(node.node), node.attr)
            case nodes.Getitem(arg=nodes.Slice(start=start, stop=stop, step=step)):
                return value(node.node)[slice(*(part and value(part) for part in (start, stop, step)))]
            case nodes.Getitem():
                return _item(value(node.node), value(node.arg))
            case nodes.Add():
                return value(node.left) + value(node.right)
            case nodes.Sub():
                return value(node.left) - value(node.right)
            case nodes.Mod():
                left, right = value(node.left), value(node.right)
                if isinstance(left, str):  # it would be formatting
                    raise ValueError("a text's remainder")
                return left % right
            case nodes.Concat():
                return "".join(_text(value(part)) for part in node.nodes)
            case nodes.And():
                return value(node.left) and value(node.right)
            case nodes.Or():
                return value(node.left) or value(node.right)
            case nodes.Neg():
                return -value(node.node)
            case nodes.Not():
                return not value(node.node)
            case nodes.CondExpr():
                chosen = node.expr1 if value(node.test) else node.expr2
                return _UNDEFINED if chosen is None else value(chosen)
            case nodes.List() | nodes.Tuple():
                return [_inner(value(item), list) for item in node.items]
            case nodes.Compare(ops=[nodes.Operand() as operand]):
                return _COMPARE[operand.op](value(node.expr), value(operand.expr))
            case nodes.Test(args=[]):
                return _TESTS[node.name](value(node.node))
            case nodes.Filter(name="length" | "count"):
                return len(value(node.node))
            case nodes.Filter(name="list"):
                return list(value(node.node))
            case nodes.Filter(name="selectattr" | "rejectattr", args=[key, nodes.Const(value=test), *other]):
                wanted, items, name = node.name == "selectattr", value(node.node), value(key)
                found = [_item(item, name) for item in items]
                passes = [item == value(other[0]) if test == "equalto" else _TESTS[test](item) for item in found]
                return [item for item, passed in zip(items, passes, strict=True) if passed == wanted]
            case nodes.Filter(name="default", args=[other]):
                given = value(node.node)
                return value(other) if given is _UNDEFINED else given
            case nodes.Filter(args=[]):
                return self._method(value(node.node), _FILTERS[node.name], [])
            case nodes.Call(node=nodes.Name(name="raise_exception")):
                raise Refused
            case nodes.Call(node=nodes.Name(name="strftime_now"), args=[form]):
                return value(form)
            case nodes.Call(node=nodes.Name(name="range")):
                numbers = range(*map(value, node.args))
                if len(numbers) > _MAX_RANGE:
                    raise ValueError("a long range")
                return list(numbers)
            case nodes.Call(node=nodes.Name(name="namespace"), args=[]):
                return _Namespace({keyword.key: _inner(value(keyword.value)) for keyword in node.kwargs})
            case nodes.Call(node=nodes.Getattr(node=owner, attr="get"), args=[key]):
                return value(owner).get(value(key))
            case nodes.Call(node=nodes.Getattr(node=owner, attr=name)) if name in _METHODS:
                return self._method(value(owner), name, [value(argument) for argument in node.args])
        raise ValueError(type(node).__name__)

    def _method(self, text: Any, name: str, arguments: list[Any]) -> Any:
        if not isinstance(text, str) or (name == "replace" and len(text) * len(arguments[1]) > _MAX_TEXT):
            raise ValueError(name)
        if name.endswith("strip") and arguments and len(arguments[0]) > _MAX_ARGUMENT:
            raise ValueError(name)
        return getattr(text, name)(*arguments)


def _text(value: Any) -> str:
    if isinstance(value, list | dict):
        raise ValueError("a list as text")
    return str(value)


def _inner(value: Any, *refused: type) -> Any:
    """The value, if it may be inside of another."""
    if isinstance(value, (_Namespace, *refused)):
        raise ValueError("a list of lists")
    return value


def _item(owner: Any, key: Any) -> Any:
    if isinstance(owner, dict) or (isinstance(owner, str | list) and isinstance(key, int)):
        try:
            return owner[key]
        except LookupError:
            return _UNDEFINED
    if owner is _UNDEFINED or owner is None:
        raise ValueError(f"{key} of nothing")
    return _UNDEFINED
