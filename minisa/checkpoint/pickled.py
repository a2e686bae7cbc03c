"""The pickle of a torch.save archive, run by a machine that can describe tensors and do nothing else.

Python's unpickler calls what a file names. torch's own with weights_only=True calls only what it trusts, but builds,
nests and hashes whatever it is told to: a hundred bytes can keep it busy for years, or ask for a terabyte. Here are
the instructions that torch.save writes for a dictionary of tensors; no other is known.
Format: the pickletools module of Python's library, protocol 2.
"""

from __future__ import annotations

import pickletools
from dataclasses import dataclass
from typing import Any

import torch

from minisa.errors import MinisaError

_STORAGES = {
    "torch FloatStorage": torch.float32, "torch HalfStorage": torch.float16, "torch BFloat16Storage": torch.bfloat16,
    "torch DoubleStorage": torch.float64, "torch LongStorage": torch.int64, "torch IntStorage": torch.int32,
    "torch ShortStorage": torch.int16, "torch CharStorage": torch.int8, "torch ByteStorage": torch.uint8,
    "torch BoolStorage": torch.bool,
}  # fmt: skip
_DICT, _TENSOR = "collections OrderedDict", "torch._utils _rebuild_tensor_v2"
_PARAMETER = "torch._utils _rebuild_parameter"


@dataclass(frozen=True, slots=True)
class Storage:
    """`size` elements that are a part of the archive. key: the part's name."""

    dtype: torch.dtype
    key: str
    size: Any


@dataclass(frozen=True, slots=True)
class PickledTensor:
    """offset and stride count elements; both and the shape may still be anything."""

    storage: Storage
    offset: Any
    shape: Any
    stride: Any


@dataclass(frozen=True, slots=True)
class _Global:
    """What a pickle names, "module name"; nothing is imported."""

    name: str


def read_pickle(pickle: bytes) -> Any:
    """What the pickle makes: dictionaries, lists and tuples of plain values and PickledTensors.

    Raises MinisaError for a name that no tensor needs, and ValueError, TypeError or LookupError for a pickle that is
    damaged or has other instructions.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}
    storages: dict[str, Storage] = {}

    def since_mark() -> list[Any]:
        mark = marks.pop()
        values = stack[mark:]
        del stack[mark:]
        return values

    argument: Any
    for opcode, argument, _ in pickletools.genops(pickle):
        match opcode.name:
            case "PROTO":
                continue
            case "MARK":
                marks.append(len(stack))
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode.name])
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE":
                stack.append(argument)
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                length = int(opcode.name[-1])
                stack[-length:] = [tuple(stack[-length:])]
            case "TUPLE":
                stack.append(tuple(since_mark()))
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "APPEND":
                item = stack.pop()
                stack[-1].append(item)
            case "APPENDS":
                items = since_mark()
                stack[-1].extend(items)
            case "SETITEM":
                key, value = stack.pop(-2), stack.pop()
                _set_items(stack[-1], [key, value])
            case "SETITEMS":
                items = since_mark()
                _set_items(stack[-1], items)
            case "GLOBAL":
                stack.append(_known(argument))
            case "BINPERSID":
                storage = _storage(stack.pop())
                if storages.setdefault(storage.key, storage) != storage:  # torch takes what it is said to be first
                    raise TypeError("a storage of two kinds")
                stack.append(storage)
            case "REDUCE":
                arguments = stack.pop()
                stack.append(_result(stack.pop(), arguments))
            case "BUILD":  # attributes, such as the versions of a state dict's modules
                stack.pop()
                if not isinstance(stack[-1], dict):  # a tensor's would put it elsewhere
                    raise TypeError("attributes for what is no dictionary")
            case "STOP":
                return stack.pop()
            case other:
                raise ValueError(f"the instruction {other}")
    raise ValueError("no end")


def _known(name: str) -> _Global:
    if name not in (_DICT, _TENSOR, _PARAMETER, *_STORAGES):
        wanted = name.replace(" ", ".")
        raise MinisaError(
            f"refused: its pickle asks for {wanted}, and loading that could run code; get a file of weights only"
        )
    return _Global(name)


def _set_items(target: Any, items: list[Any]) -> None:
    if not isinstance(target, dict):
        raise TypeError("items for what is no dictionary")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if not isinstance(key, str | int):  # a tuple of tuples could take forever to hash
            raise TypeError("a dictionary's key is no string")
        target[key] = value


def _storage(persistent_id: Any) -> Storage:
    kind, storage_type, key, _, size = persistent_id
    if kind != "storage" or not isinstance(storage_type, _Global) or not isinstance(key, str):
        raise TypeError("something persistent that is no storage")
    return Storage(_STORAGES[storage_type.name], key, size)


def _result(function: Any, arguments: Any) -> Any:
    """What a call of one of the three known functions gives."""
    name = function.name if isinstance(function, _Global) else None
    if name == _DICT and arguments == ():
        return {}
    if name == _TENSOR:
        storage, offset, shape, stride, _requires_grad, _hooks, *metadata = arguments
        if not isinstance(storage, Storage):
            raise TypeError("a tensor without a storage")
        if any(metadata):  # that its elements are the negatives of those stored
            raise TypeError("a tensor with metadata")
        return PickledTensor(storage, offset, shape, stride)
    if name == _PARAMETER:
        return arguments[0]
    raise TypeError("a call of what is no function")
