"""Merges: tiktoken and sentencepiece, which rank tokens, must do what a list of pairs says. Any list."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minisa.errors import MinisaError
from minisa.text.bytelevel import ByteLevelBPE
from minisa.text.merges import merge_order

Merges = list[tuple[bytes, bytes]]


def bpe(piece: bytes, merges: Merges) -> list[bytes]:
    """BPE as it is defined: join the leftmost of the pairs that stand first in the list, until none is left."""
    parts = [piece[i : i + 1] for i in range(len(piece))]
    order = {pair: place for place, pair in enumerate(merges)}  # of a pair listed twice Hugging Face's takes the last
    while True:
        listed = [(order[pair], i) for i, pair in enumerate(itertools.pairwise(parts)) if pair in order]
        if not listed:
            return parts
        i = min(listed)[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


@st.composite
def trained(draw: st.DrawFn) -> Merges:
    """What a trainer writes: each merge joins two tokens that stood side by side in a text as merged so far."""
    corpus = draw(st.lists(st.text("ab", min_size=2, max_size=12), min_size=1, max_size=4))
    merges: Merges = []
    for _ in range(draw(st.integers(0, 8))):
        words = [bpe(word.encode(), merges) for word in corpus]
        pairs = sorted({pair for word in words for pair in itertools.pairwise(word)})
        if not pairs:
            break
        merges.append(draw(st.sampled_from(pairs)))
    return merges


@st.composite
def arbitrary(draw: st.DrawFn) -> Merges:
    tokens = [b"a", b"b"]
    merges = []
    for _ in range(draw(st.integers(1, 9))):
        pair = draw(st.sampled_from(tokens)), draw(st.sampled_from(tokens))
        merges.append(pair)
        tokens.append(pair[0] + pair[1])
    return draw(st.permutations(merges)) if draw(st.booleans()) else merges


@st.composite
def every_pair(draw: st.DrawFn) -> Merges:
    """What becomes of a vocabulary in tiktoken's or sentencepiece's format: all the pairs that make each token, token
    after token; with Llama 2's, those of runs of spaces mixed, too."""
    names = draw(st.lists(st.text("ab", min_size=2, max_size=6), unique=True, max_size=12))
    tokens = [b"a", b"b"]
    for token in map(str.encode, names):
        if any(token[:i] in tokens and token[i:] in tokens for i in range(1, len(token))):
            tokens.append(token)
    splits = ((token[:i], token[i:]) for token in tokens for i in range(1, len(token)))
    pairs = [pair for pair in splits if pair[0] in tokens and pair[1] in tokens]
    return draw(st.permutations(pairs)) if draw(st.booleans()) else pairs


def by_tiktoken(piece: bytes, merges: Merges, whole_pieces: bool) -> list[bytes]:
    tokens = dict.fromkeys([*(bytes([byte]) for byte in range(256)), *(left + right for left, right in merges)])
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    ranked = merge_order(merges, vocab)
    vocabulary = ByteLevelBPE("(?s:.+)", vocab, {}, ranked=ranked, whole_pieces=whole_pieces, add_bos=False)
    return [vocabulary.pieces[i] for i in vocabulary.encode(piece.decode(), mid_text=False)]


@settings(deadline=None, max_examples=500)
@given(
    merges=trained() | arbitrary() | every_pair(),
    text=st.text("ab", min_size=1, max_size=16),
    whole_pieces=st.booleans(),
)
def test_tiktoken_does_what_the_merges_say(merges: Merges, text: str, whole_pieces: bool) -> None:
    piece = text.encode()
    whole = whole_pieces and piece in {left + right for left, right in merges}
    assert by_tiktoken(piece, merges, whole_pieces) == ([piece] if whole else bpe(piece, merges))


@pytest.mark.parametrize(
    ("merges", "text", "expected"),
    [
        ("a b, b c, a bc", "abc", "ab c"),  # tiktoken, told of abc, would join ab and c, list or no list
        ("a b, b b, a bb, b a, ab b", "abba", "ab ba"),  # abb is made by its second pair
        ("b c, a b, c d, ab cd", "abcd", "a bc d"),  # abcd is never made
        ("a aa, aa a, a a", "aaaaa", "aaa aa"),  # runs with the single characters last, as Llama 2's of spaces
        ("a b, a b", "abab", "ab ab"),
    ],
)
def test_lists_by_which_ranks_are_not_obvious(merges: str, text: str, expected: str) -> None:
    pairs = [(left.encode(), right.encode()) for left, right in (pair.split() for pair in merges.split(", "))]
    assert by_tiktoken(text.encode(), pairs, False) == bpe(text.encode(), pairs) == expected.encode().split()


@pytest.mark.parametrize(
    ("tokens", "says"),
    [([b"a", b"b"], "the merges make b'ab', which is not in the vocabulary"), ([b"a" * 6000], "too long to merge")],
)
def test_what_is_refused(tokens: list[bytes], says: str) -> None:
    with pytest.raises(MinisaError, match=says):
        merge_order([(b"a", b"b")], tokens)
