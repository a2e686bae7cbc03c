"""Merges: tiktoken must do what a merges list says, or the list is refused."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minisa.errors import MinisaError
from minisa.text.bytelevel import ByteLevelBPE
from minisa.text.merges import BYTES, rank_merges


def bpe(piece: bytes, merges: list[tuple[bytes, bytes]]) -> list[bytes]:
    """BPE as it is defined: join the leftmost of the pairs that stand first in the list, until none is left."""
    parts = [piece[i : i + 1] for i in range(len(piece))]
    order = {pair: rank for rank, pair in reversed(list(enumerate(merges)))}
    while True:
        ranked = [(order[pair], i) for i, pair in enumerate(itertools.pairwise(parts)) if pair in order]
        if not ranked:
            return parts
        i = min(ranked)[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


@st.composite
def trained_merges(draw: st.DrawFn) -> list[tuple[bytes, bytes]]:
    """What a trainer writes: each merge joins two tokens that stood side by side in a text as merged so far."""
    corpus = draw(st.lists(st.text("ab", min_size=2, max_size=12), min_size=1, max_size=4))
    merges: list[tuple[bytes, bytes]] = []
    for _ in range(draw(st.integers(0, 8))):
        words = [bpe(word.encode(), merges) for word in corpus]
        pairs = sorted({pair for word in words for pair in itertools.pairwise(word)})
        if not pairs:
            break
        merges.append(draw(st.sampled_from(pairs)))
    return merges


@st.composite
def arbitrary_merges(draw: st.DrawFn) -> list[tuple[bytes, bytes]]:
    tokens = [b"a", b"b"]
    merges = []
    for _ in range(draw(st.integers(1, 9))):
        pair = draw(st.sampled_from(tokens)), draw(st.sampled_from(tokens))
        merges.append(pair)
        tokens.append(pair[0] + pair[1])
    return draw(st.permutations(merges)) if draw(st.booleans()) else merges


@st.composite
def every_pair(draw: st.DrawFn) -> list[tuple[bytes, bytes]]:
    """What becomes of a vocabulary in tiktoken's format: all the pairs that make each token, token after token."""
    names = draw(st.lists(st.text("ab", min_size=2, max_size=5), unique=True, max_size=12))
    tokens = [b"a", b"b"]
    for token in map(str.encode, names):
        if any(token[:i] in tokens and token[i:] in tokens for i in range(1, len(token))):
            tokens.append(token)
    splits = [(token[:i], token[i:]) for token in tokens for i in range(1, len(token))]
    return [pair for pair in splits if pair[0] in tokens and pair[1] in tokens]


@st.composite
def runs_last(draw: st.DrawFn) -> list[tuple[bytes, bytes]]:
    """Every pair of each token, and at the end, in any order but for a+a, those of aa, aaa and so on."""
    runs = [b"a" * n for n in range(1, draw(st.integers(4, 8)))]
    tokens = [*runs, b"b"]
    for token in map(str.encode, draw(st.lists(st.text("ab", min_size=2, max_size=6), unique=True, max_size=8))):
        if b"b" in token and any(token[:i] in tokens and token[i:] in tokens for i in range(1, len(token))):
            tokens.append(token)
    splits = [(token[:i], token[i:]) for token in tokens for i in range(1, len(token))]
    pairs = [pair for pair in splits if pair[0] in tokens and pair[1] in tokens]
    last = [pair for pair in pairs if pair[0] + pair[1] in runs and pair != (b"a", b"a")]
    return [*(pair for pair in pairs if pair[0] + pair[1] not in runs), *draw(st.permutations(last)), (b"a", b"a")]


def tokens_by_rank(piece: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """What sentencepiece does: join the leftmost of the pairs that are together the token of lowest rank."""
    parts = [piece[i : i + 1] for i in range(len(piece))]
    while True:
        joined = [
            (ranks[left + right], i)
            for i, (left, right) in enumerate(itertools.pairwise(parts))
            if left + right in ranks
        ]
        if not joined:
            return parts
        i = min(joined)[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def tokens_by_tiktoken(piece: bytes, merges: list[tuple[bytes, bytes]], whole_pieces: bool) -> list[bytes]:
    ranks = rank_merges(merges, BYTES, strays=whole_pieces)
    vocabulary = ByteLevelBPE("(?s:.+)", ranks, ranks, {}, add_bos=False)
    return [vocabulary.pieces[i] for i in vocabulary.encode(piece.decode(), mid_text=False)]


@settings(deadline=None)
@given(merges=trained_merges(), text=st.text("ab", min_size=1, max_size=14))
def test_trained_merges_are_taken(merges: list[tuple[bytes, bytes]], text: str) -> None:
    assert tokens_by_tiktoken(text.encode(), merges, False) == bpe(text.encode(), merges)


@settings(deadline=None, max_examples=300)
@given(merges=every_pair(), text=st.text("ab", min_size=1, max_size=14))
def test_merges_from_tiktokens_format_are_taken(merges: list[tuple[bytes, bytes]], text: str) -> None:
    piece = text.encode()
    whole = piece in {left + right for left, right in merges}
    assert tokens_by_tiktoken(piece, merges, True) == ([piece] if whole else bpe(piece, merges))


@settings(deadline=None, max_examples=300)
@given(merges=arbitrary_merges(), text=st.text("ab", min_size=1, max_size=14), whole_pieces=st.booleans())
def test_other_merges_are_taken_or_refused(merges: list[tuple[bytes, bytes]], text: str, whole_pieces: bool) -> None:
    piece = text.encode()
    try:
        tokens = tokens_by_tiktoken(piece, merges, whole_pieces)
    except MinisaError:
        return
    whole = whole_pieces and piece in {left + right for left, right in merges}
    assert tokens == ([piece] if whole else bpe(piece, merges))


@settings(deadline=None, max_examples=300)
@given(merges=runs_last(), text=st.text("aaab", min_size=1, max_size=30))
def test_runs_of_the_same_last_rank_are_taken(merges: list[tuple[bytes, bytes]], text: str) -> None:
    """As Llama 2's tokenizer.json has them of spaces; only where equal ranks are joined from the left."""
    ranks = rank_merges(merges, [b"a", b"b"], strays=True, ties=True)
    assert ranks[b"aa"] == ranks[b"aaa"] == max(ranks.values())
    assert tokens_by_rank(text.encode(), ranks) == bpe(text.encode(), merges)


@settings(deadline=None, max_examples=300)
@given(merges=runs_last().flatmap(st.permutations) | arbitrary_merges(), text=st.text("ab", min_size=1, max_size=14))
def test_runs_otherwise_listed_are_taken_or_refused(merges: list[tuple[bytes, bytes]], text: str) -> None:
    try:
        ranks = rank_merges(merges, [b"a", b"b"], strays=True, ties=True)
    except MinisaError:
        return
    assert tokens_by_rank(text.encode(), ranks) == bpe(text.encode(), merges)


def test_merges_that_tiktoken_would_not_follow() -> None:
    """abc is listed as a+bc, but BPE comes to ab+c, which tiktoken would join, list or no list."""
    merges = [(b"a", b"b"), (b"b", b"c"), (b"a", b"bc")]
    assert bpe(b"abc", merges) == [b"ab", b"c"]
    with pytest.raises(MinisaError, match="do not lead to the token b'abc'"):
        rank_merges(merges, BYTES, strays=False)


def test_merges_out_of_order() -> None:
    """abb is made by the last merge only, so after ba; by the first place it is listed at it would come before."""
    merges = [(b"a", b"b"), (b"b", b"b"), (b"a", b"bb"), (b"b", b"a"), (b"ab", b"b")]
    assert bpe(b"abba", merges) == [b"ab", b"ba"]
    for whole_pieces in (False, True):
        with pytest.raises(MinisaError, match="do not lead to the token b'abb'"):
            rank_merges(merges, BYTES, strays=whole_pieces)


def test_a_token_that_merging_never_comes_to() -> None:
    """Llama 3 has 695 such tokens; they are taken where a piece of text is just that token."""
    merges = [(b"b", b"c"), (b"a", b"b"), (b"c", b"d"), (b"ab", b"cd")]  # but abcd becomes a, bc, d
    assert tokens_by_tiktoken(b"abcd", merges, True) == [b"abcd"]
    assert tokens_by_tiktoken(b"abcda", merges, True) == [b"a", b"bc", b"d", b"a"]
    with pytest.raises(MinisaError, match="do not lead to the token b'abcd'"):
        rank_merges(merges, BYTES, strays=False)
