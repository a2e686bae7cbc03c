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
    if unknown := {left + right for left, right in places}.difference(tokens):
        raise MinisaError(f"the merges make {min(unknown)!r}, which is not in the vocabulary: is the file whole?")
    made = sorted((_last_merge(token, places), token) for token in tokens if len(token) > 1)
    return [token for place, token in made if place < _UNLISTED]


def _last_merge(token: T, places: dict[tuple[T, T], int]) -> int:
    """The place of the pair that is joined last when merging makes a token; _UNLISTED where it does not make it."""
    parts = [token[i : i + 1] for i in range(len(token))]
    place = _UNLISTED
    while len(parts) > 1:
        place = _UNLISTED
        for i, pair in enumerate(pairwise(parts)):
            if (found := places.get(pair, place)) < place:
                place, at = found, i
        if place == _UNLISTED:
            break
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return place
