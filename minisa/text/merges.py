"""From a list of BPE merges to ranked tokens: what Hugging Face's and GGUF files hold, as tiktoken and sentencepiece
want it.

A merges list joins the adjacent pair that stands first in the list; tiktoken and sentencepiece join the adjacent pair
that is together the token of lowest rank (of highest score), whether or not that pair stands in a list. With the merges
"b c", "a b", "ab c", for example, the list leaves "abc" as a + bc, since "b c" comes first and "a bc" is not listed;
tiktoken goes on to abc. They agree in two cases, and `rank_merges` makes sure of one of them:

* The list has, for every token, the pair that BPE comes to when it makes that token. One pair will do: the bytes of
  a token about to be made have had its ends as borders since the beginning, so inside them BPE went as it would have
  gone with these bytes alone. A list that a trainer wrote is such a list; it wrote down the pairs it came to.
* The list has every pair of tokens that are a token together, sorted by that token. This is how vocabularies in
  tiktoken's own format, such as Llama 3's, and in sentencepiece's are turned into merges. Sentencepiece's may have one
  lowest score for all runs of a character, as Llama 2's have for two to sixteen spaces, and their pairs in any order
  but for the single characters', which is last. Of equal scores sentencepiece takes what stands further left, so it
  lengthens the run that it has begun before it begins another; with that pair last, so does the list.

Tokens are bytes over the alphabet of all bytes, or text over one of characters.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from minisa.errors import MinisaError

T = TypeVar("T", bytes, str)

MAX_LENGTH = 1 << 22  # of all tokens together, each of whose splits is looked at; the largest vocabularies take 2 MB
BYTES = [bytes([byte]) for byte in range(256)]

_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
_NO_BYTE = 0x2717
_BYTES = {0x100 + n: byte for n, byte in enumerate(_OTHERS)} | dict.fromkeys(_OTHERS, _NO_BYTE)


def token_to_bytes(token: str) -> bytes:
    """The bytes of a token in GPT-2's spelling, where each byte is a printable character ("Ġ" is a space).

    Raises ValueError for a character outside that alphabet.
    """
    return token.translate(_BYTES).encode("latin-1")


def rank_merges(
    merges: Iterable[tuple[T, T]], alphabet: Iterable[T], *, strays: bool, ties: bool = False
) -> dict[T, int]:
    """Token → rank: the alphabet, then what the merges make, in their order.

    ties: of equal ranks what stands further left is joined first. Runs may then share the last rank.
    strays: there may be tokens that merging never comes to. To tiktoken they must then be of use, since it does not
        take a piece of text apart that is a token as it stands (Hugging Face's ignore_merges); Llama 3 has hundreds.
    Raises MinisaError when to join by these ranks would not do what the merges say.
    """
    pairs = list(merges)
    if len(set(pairs)) < len(pairs):  # for Hugging Face's the last place counts, for llama.cpp the first
        raise MinisaError("the merges have a pair twice: expected them as BPE training writes them")
    ranks = {unit: rank for rank, unit in enumerate(alphabet)}
    runs = _last_runs(pairs) if ties else set()
    for left, right in pairs:
        if left + right not in runs:
            ranks.setdefault(left + right, len(ranks))
    ranks |= dict.fromkeys(runs, len(ranks))
    if sum(map(len, ranks)) > MAX_LENGTH:
        raise MinisaError(f"the merges make tokens of a length of more than {MAX_LENGTH}: expected the makers'")
    stray = _stray_token(pairs, ranks)
    if stray is not None and not (strays and _has_every_pair(pairs, ranks)):
        raise MinisaError(f"the merges do not lead to the token {stray!r}: expected them as BPE training writes them")
    return ranks


def _last_runs(pairs: list[tuple[T, T]]) -> set[T]:
    """The runs of one character that the end of the list makes, from two on, if it has the single characters last."""
    runs: set[T] = set()
    if not pairs or len(pairs[-1][0]) != 1 or pairs[-1][0] != pairs[-1][1]:
        return runs
    for left, right in reversed(pairs):
        if (left + right).strip(pairs[-1][0]):
            break
        runs.add(left + right)
    return runs if {len(run) for run in runs} == set(range(2, len(runs) + 2)) else set()


def _stray_token(pairs: list[tuple[T, T]], ranks: dict[T, int]) -> T | None:
    """A token that BPE does not come to by a pair listed in due order, if there is one."""
    parts = {unit: (unit[:0], unit[:0]) for unit in ranks if len(unit) == 1}  # what BPE makes each token from
    last = 0
    for left, right in pairs:
        token = left + right
        rank = ranks[token]
        if token not in parts and rank > last and left in parts and right in parts and _meet(left, right, ranks, parts):
            parts[token] = left, right
            last = rank
    return next((token for token in ranks if token not in parts), None)


def _has_every_pair(pairs: list[tuple[T, T]], ranks: dict[T, int]) -> bool:
    """Whether all pairs of tokens that are a token together are listed, sorted by that token."""
    made = [ranks[left + right] for left, right in pairs]
    splits = ((token[:i], token[i:]) for token in ranks for i in range(1, len(token)))
    listed = set(pairs)
    return made == sorted(made) and all(pair in listed for pair in splits if pair[0] in ranks and pair[1] in ranks)


def _meet(left: T, right: T, ranks: dict[T, int], parts: dict[T, tuple[T, T]]) -> bool:
    """Whether BPE, alone with left + right, comes to just these two tokens.

    Goes back in time: of the tokens on either side of the border, the one that was made last is taken apart. The
    two that met at the border just before must not have been joined first: by a lower rank, or, at the same rank,
    by standing further left.
    """
    while True:
        if len(left) > 1 and (len(right) == 1 or ranks[left] > ranks[right]):
            made = ranks[left]
            left = parts[left][1]
            if ranks.get(left + right, made) < made:
                return False
        elif len(right) > 1:
            made = ranks[right]
            right = parts[right][0]
            if ranks.get(left + right, made + 1) <= made:
                return False
        else:
            return True
