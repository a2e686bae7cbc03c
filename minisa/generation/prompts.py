"""What a caller may give as a prompt: text, token ids of any library, a dialog, or several of the former; and which
options beside it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence, Set
from operator import index

from minisa.errors import MinisaError, shown
from minisa.text.chat import Message

Prompt = str | Sequence[int]


def as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """Several prompts as they are, one as a list of it."""
    if isinstance(prompts, str | bytes | bytearray | Mapping | Set) or not isinstance(prompts, Iterable):
        return [prompts]
    if getattr(prompts, "ndim", 1) == 0:  # of another library, and nothing to iterate over
        return [prompts]  # type: ignore[list-item]
    several = list(prompts)
    # A number; of another library's arrays, one without dimensions.
    if several and hasattr(several[0], "__index__") and not getattr(several[0], "ndim", 0):
        return [several]  # type: ignore[list-item]
    return several  # type: ignore[return-value]


def as_ids(ids: Iterable[int], what: str, *, ordered: bool = True) -> list[int]:
    """Whole numbers of any kind as Python's. MinisaError for anything else; what: has them, for the message.

    ordered: whether a set, which has an order of its own, is anything else too.
    """
    try:
        # Text that was encoded already, or no list at all.
        if isinstance(ids, bytes | bytearray | Mapping) or (ordered and isinstance(ids, Set)):
            raise TypeError
        return [index(token) for token in ids]
    except TypeError:
        raise MinisaError(f"{what}: expected token ids, found {shown(ids)}") from None


def is_dialog(prompt: Prompt | Sequence[Message]) -> bool:
    """Whether it is messages, not text or token ids."""
    return isinstance(prompt, Sequence) and bool(prompt) and isinstance(prompt[0], Mapping)


def check_names(given: Iterable[str], options: type, what: str) -> None:
    """MinisaError for the name of no option in a TypedDict; what: was called with it, for the message."""
    known = options.__annotations__
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1) or known
            raise MinisaError(f"{what}: there is no option {name}: expected {', '.join(near)}")
