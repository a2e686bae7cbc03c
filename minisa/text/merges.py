"""From a list of BPE merges to tokens in order: what tokenizer.json and GGUF files hold, as tiktoken and sentencepiece
want it.

A merges list joins the adjacent pair that is listed first. The two libraries know no pairs: they join the adjacent
tokens that together are the token of lowest rank. Both do the same if each token's rank is the place of the pair that
its own bytes are last joined from. Wherever a token appears in a text, nothing was joined across its two ends before,
so its inside was merged as its bytes alone would be, and it is made from that one pair or not at all. Llama 3 has
hundreds of tokens that the list never makes from their bytes; these must get no rank.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from itertools import pairwise
from typing import TypeVar

from minisa.errors import MinisaError

T = TypeVar("T", bytes, str)

MAX_WORK = 1 << 25  # sum of the tokens' squared lengths, which bounds the time; Llama 3's is 7 million
_UNLISTED = 1 << 32  # a place behind all merges

_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
_NO_BYTE = 0x2717
_BYTES = {0x100 + n: byte for n, byte in enumerate(_OTHERS)} | dict.fromkeys(_OTHERS, _NO_BYTE)


def token_to_bytes(token: str) -> bytes:
    """The bytes of a token in GPT-2's spelling, where each byte is a printable character ("Ġ" is a space).

    Raises ValueError for a character outside that alphabet.
    """
    return token.translate(_BYTES).encode("latin-1")


def merge_order(merges: Iterable[tuple[T, T]], tokens: Collection[T]) -> list[T]:
    """The tokens that merging can make, in the order of rank.

    merges: pairs of tokens, the first to be joined first. tokens: bytes, made of single bytes, or text, of characters.
    Raises MinisaError when the merges make something that is no token, or the tokens are far longer than any maker's.
    """
    if sum(len(token) ** 2 for token in tokens) > MAX_WORK:
        raise MinisaError("its tokens are too long to merge in reasonable time: expected a maker's own vocabulary")
    places = {pair: place for place, pair in enumerate(merges)}
    listed: dict[T, tuple[T, T] | None] = {}  # the pair that makes a token, None where there are several
    for pair in places:
        token = pair[0] + pair[1]
        listed[token] = None if token in listed else pair
    if unknown := listed.keys() - set(tokens):
        raise MinisaError(f"the merges make {min(unknown)!r}, which is not in the vocabulary: is the file whole?")
    # Of the tokens made in the order of the list, bottom up: the place and the parts of their last merge.
    made: dict[T, tuple[int, T, T]] = {token: (-1, token, token) for token in tokens if len(token) == 1}
    ranks = []
    last: tuple[T, T] | None
    for token, only in sorted(listed.items(), key=lambda item: len(item[0])):
        if only and all(part in made and made[part][0] < places[only] for part in only):
            last = None if _cross(*only, places, made) else only
        else:
            last = _last_merge(token, places)
        if last:
            ranks.append((place := places[last], token))
            if all(part in made and made[part][0] < place for part in last):
                made[token] = (place, last[0], last[1])
    return [token for _, token in sorted(ranks)]


def _cross(a: T, b: T, places: dict[tuple[T, T], int], made: dict[T, tuple[int, T, T]]) -> bool:
    """Whether something is joined across the boundary of two tokens before both are whole.

    Their merges at the boundary are undone from the last to the first. Of equal pairs the leftmost is joined first.
    """
    next_a = next_b = _UNLISTED  # places of the merges that come next on either side
    while True:
        (at_a, _, right), (at_b, left, _) = made[a], made[b]
        if at_a < 0 and at_b < 0:
            return False
        if at_a > at_b:
            a, next_a = right, at_a
        else:
            b, next_b = left, at_b
        place = places.get((a, b), _UNLISTED)
        if place < next_a and place <= next_b:
            return True


def _last_merge(token: T, places: dict[tuple[T, T], int]) -> tuple[T, T] | None:
    """The pair that is joined last when merging makes a token; None where it does not make it."""
    parts = [token[i : i + 1] for i in range(len(token))]
    last: tuple[T, T] | None = None
    while len(parts) > 1:
        place, at = min((places.get(pair, _UNLISTED), i) for i, pair in enumerate(pairwise(parts)))
        if place == _UNLISTED:
            return None
        last = parts[at], parts[at + 1]
        parts[at : at + 2] = [last[0] + last[1]]
    return last
