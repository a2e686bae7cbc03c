"""From a list of BPE merges to ranked tokens: what Hugging Face's and GGUF files hold, as tiktoken wants it.

A merges list joins the adjacent pair that stands first in the list; tiktoken joins the adjacent pair whose bytes
together are the token of lowest rank, whether or not that pair stands in a list. The two agree when every token
is made from the pair that BPE really comes to. The bytes of a token that is about to be made had both its ends
as boundaries since the beginning, so inside them BPE went as if they were alone: there is one pair that it comes
to, whatever stands around it. `rank_merges` finds this pair for each token and makes sure that the list has it.
A list that a trainer wrote always does, because it saw the pair it wrote down.
"""

from __future__ import annotations

from collections.abc import Iterable

from minisa.errors import MinisaError

Pair = tuple[bytes, bytes]

_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
_NO_BYTE = 0x2717
_BYTES = {0x100 + n: byte for n, byte in enumerate(_OTHERS)} | dict.fromkeys(_OTHERS, _NO_BYTE)


def token_to_bytes(token: str) -> bytes:
    """The bytes of a token in GPT-2's spelling, where each byte is a printable character ("Ġ" is a space).

    Raises ValueError for a character outside that alphabet.
    """
    return token.translate(_BYTES).encode("latin-1")


def rank_merges(merges: Iterable[Pair], *, whole_pieces: bool) -> dict[bytes, int]:
    """Token → rank: the 256 bytes, then what the merges make, in their order.

    whole_pieces: a piece of text that is a token as it stands is not taken apart (Hugging Face's ignore_merges), so
        a token that merging never comes to has its use. Llama 3 has 695 of them.
    Raises MinisaError when tiktoken with these ranks would not do what the merges say.
    """
    ranks = {bytes([byte]): byte for byte in range(256)}
    parts: dict[bytes, Pair] = {token: (token, b"") for token in ranks}  # the pair BPE makes each token from
    listed: dict[bytes, list[Pair]] = {}  # pairs that BPE does not come to
    last = 0
    for left, right in merges:
        token = left + right
        rank = ranks.setdefault(token, len(ranks))
        if token in parts:
            continue
        if left in parts and right in parts and ranks[right] < rank > ranks[left] and _meet(left, right, ranks, parts):
            parts[token] = left, right
            if rank < last:
                raise MinisaError(f"the merges of {token!r} are out of order: expected those of one token together")
            last = rank
        else:
            listed.setdefault(token, []).append((left, right))
    for token in ranks.keys() - parts.keys():
        splits = ((token[:i], token[i:]) for i in range(1, len(token)))
        if not whole_pieces or any(a in ranks and b in ranks and (a, b) not in listed[token] for a, b in splits):
            raise MinisaError(
                f"the merges do not lead to the token {token!r}: expected a list as BPE training writes it"
            )
    return ranks


def _meet(left: bytes, right: bytes, ranks: dict[bytes, int], parts: dict[bytes, Pair]) -> bool:
    """Whether BPE, alone with the bytes of left + right, comes to just these two tokens.

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
