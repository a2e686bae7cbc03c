"""How likely a model finds answers after prompts: many at once, with what an item's choices share computed once.

    item     prompt A B C D E      choices  D E x y | D E z        (x y and z: the answers' tokens)
    prefix   A B C D               fed once
    rows     E x                   each choice's own tokens, fed after a copy of the prefix's keys and values
             E                     the next-token distributions here score x, y and z

Rows are padded on the right. A slot after a row's end is never attended to, so the padding changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minisa.cache import StaticCache
from minisa.errors import MinisaError
from minisa.model import Transformer
from minisa.runners.eager import prefill_chunks
from minisa.study.loss import ROWS, window_cache
from minisa.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Scored:
    """Token ids of a prompt and its answer; the last `answer_tokens` of them are the answer's.

    cut: whether the text was too long for the model and has lost its beginning.
    """

    ids: tuple[int, ...]
    answer_tokens: int
    cut: bool = False


@dataclass(frozen=True, slots=True)
class Likelihood:
    """total: log p(answer | prompt) in nats. greedy: whether each of its tokens is the likeliest one."""

    total: float
    greedy: bool


@dataclass(frozen=True, slots=True)
class Item:
    """The choices of one question, and how many first tokens of theirs are fed once for all of them."""

    choices: tuple[Scored, ...]
    shared: int

    @classmethod
    def of(cls, choices: Sequence[Scored]) -> Item:
        first = choices[0].ids
        limit = min(len(choice.ids) - choice.answer_tokens - 1 for choice in choices)
        shared = 0
        while shared < limit and all(choice.ids[shared] == first[shared] for choice in choices):
            shared += 1
        return cls(tuple(choices), shared)

    @property
    def longest(self) -> int:
        """Tokens of the longest row that is fed after the prefix."""
        return max(len(choice.ids) for choice in self.choices) - 1 - self.shared

    @property
    def tokens(self) -> int:
        """Tokens to be fed for this item."""
        return self.shared + sum(len(choice.ids) - 1 - self.shared for choice in self.choices)


def encode(tokenizer: Tokenizer, prompt: str, answer: str, max_length: int) -> Scored:
    """Tokens of prompt + answer, of which the answer's are what encoding the prompt alone does not give.

    A space at the prompt's end counts as the answer's. Of a text longer than max_length the beginning is left out.
    Raises MinisaError where no token of the answer is left after one of the prompt.
    """
    stripped = prompt.rstrip()
    answer, prompt = prompt[len(stripped) :] + answer, stripped
    bos = tokenizer.bos_ids
    start = bos + tokenizer.encode(prompt) if prompt else bos
    ids = bos + tokenizer.encode(prompt + answer)
    # Should a merge across the border leave the answer without a token, its last one is scored all the same.
    answer_tokens = max(len(ids) - len(start), 1)
    answer_tokens = min(answer_tokens, max_length - 1, len(ids) - 1)
    if answer_tokens < 1:
        raise MinisaError(
            f"{answer!r} after {prompt[-60:]!r}: {len(ids)} tokens, of which the model takes {max_length}: "
            "expected two or more, leave the row out or take another model"
        )
    return Scored(tuple(ids[-max_length:]), answer_tokens, cut=len(ids) > max_length)


def batches(items: Sequence[Item], max_tokens: int) -> Iterator[list[int]]:
    """Indices of items that go through the model together, longest first: at most max_tokens cache slots a batch."""
    order = sorted(range(len(items)), key=lambda i: (-items[i].shared, -items[i].longest, i))
    batch: list[int] = []
    for i in order:
        together = [items[j] for j in [*batch, i]]
        rows = sum(len(item.choices) for item in together)
        length = max(item.shared for item in together) + max(item.longest for item in together)
        if batch and rows * length > max_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


@torch.inference_mode()
def likelihoods(model: Transformer, items: Sequence[Item]) -> list[list[Likelihood]]:
    """The likelihood of every choice of every item, all in one batch."""
    device = model.norm.weight.device
    rows = [(i, choice) for i, item in enumerate(items) for choice in item.choices]
    longest_prefix = max(item.shared for item in items)
    longest = max(item.longest for item in items)
    cache = window_cache(model, len(rows), longest_prefix + longest)
    owners = torch.tensor([i for i, _ in rows], device=device)
    if longest_prefix:
        prefixes = _padded([item.choices[0].ids[: item.shared] for item in items]).to(device)
        _feed_once(model, prefixes, owners, cache)
    starts = torch.tensor([item.shared for item in items], device=device)[owners]
    own = _padded([choice.ids[items[i].shared : -1] for i, choice in rows]).to(device)
    positions = starts[:, None] + torch.arange(longest, device=device)
    hidden = model.hidden(own, positions, cache)  # [rows, longest, dim]
    ends = [len(choice.ids) - 1 - items[i].shared for i, choice in rows]
    sizes = [choice.answer_tokens for _, choice in rows]
    scored = torch.cat([x[end - size : end] for x, end, size in zip(hidden, ends, sizes, strict=True)])
    targets = torch.tensor([token for _, choice in rows for token in choice.ids[-choice.answer_tokens :]])
    found, likeliest = _log_probabilities(model, scored, targets.to(device))
    results: list[list[Likelihood]] = [[] for _ in items]
    for (i, _), values, greedy in zip(rows, found.split(sizes), likeliest.split(sizes), strict=True):
        results[i].append(Likelihood(values.sum().item(), bool(greedy.all())))
    return results


def _feed_once(model: Transformer, prefixes: Tensor, owners: Tensor, cache: StaticCache) -> None:
    """Feed prefixes [items, T] and copy their keys and values to the rows [rows] of the cache that begin with them."""
    length = prefixes.shape[1]
    once = window_cache(model, len(prefixes), length)
    for _ in prefill_chunks(model, prefixes, 0, once):
        pass
    cache.keys[:, :, :, :length] = once.keys[:, owners]
    cache.values[:, :, :, :length] = once.values[:, owners]


def _log_probabilities(model: Transformer, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """log p [N] fp64 of targets [N] after hidden states [N, dim], and whether each is the likeliest; on the CPU."""
    found, likeliest = [], []
    for part, wanted in zip(hidden.split(ROWS), targets.split(ROWS), strict=True):
        logits = model.head(part).float()
        chosen = logits.gather(1, wanted[:, None])[:, 0]
        found.append((chosen - logits.logsumexp(1)).cpu().double())
        likeliest.append((logits.argmax(1) == wanted).cpu())
    return torch.cat(found), torch.cat(likeliest)


def _padded(rows: Sequence[Sequence[int]]) -> Tensor:
    """int64 [len(rows), longest], zeros on the right."""
    padded = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    for row, ids in zip(padded, rows, strict=True):
        row[: len(ids)] = torch.tensor(ids, dtype=torch.int64)
    return padded
