"""Log-likelihoods of many texts at once; what the choices of one question have in common is computed once.

    texts     A B C D E x y | A B C D E z      x, y and z are scored
    prefix    A B C D       fed once
    rows      E x           each text's own tokens but the last, after a copy of the prefix's keys and values
              E             the predictions here score x, y and z

Rows are padded on the right. No token attends to a slot after it, so the padding changes nothing.
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
from minisa.study.loss import NO_NUMBERS, ROWS, window_cache


@dataclass(frozen=True, slots=True)
class Item:
    """Texts as token ids, each with the number of its last tokens to score.

    shared: length of the prefix that is fed once for all of them.
    """

    texts: tuple[tuple[list[int], int], ...]
    shared: int

    @classmethod
    def of(cls, texts: Sequence[tuple[list[int], int]]) -> Item:
        first = texts[0][0]
        limit = min(len(ids) - scored - 1 for ids, scored in texts)
        shared = next((i for i in range(limit) if any(ids[i] != first[i] for ids, _ in texts)), limit)
        return cls(tuple(texts), shared)

    @property
    def longest(self) -> int:
        """Tokens of the longest row that is fed after the prefix."""
        return max(len(ids) for ids, _ in self.texts) - 1 - self.shared

    @property
    def tokens(self) -> int:
        """Tokens to feed."""
        return self.shared + sum(len(ids) - 1 - self.shared for ids, _ in self.texts)


def batches(items: Sequence[Item], max_tokens: int) -> Iterator[list[int]]:
    """Indices of items to be run together, longest first: at most max_tokens cache slots, or a single item."""
    batch: list[int] = []
    for i in sorted(range(len(items)), key=lambda i: (-items[i].shared, -items[i].longest)):
        together = [items[j] for j in [*batch, i]]
        length = max(item.shared for item in together) + max(item.longest for item in together)
        if batch and length * sum(len(item.texts) for item in together) > max_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


@torch.inference_mode()
def likelihoods(model: Transformer, items: Sequence[Item]) -> list[list[tuple[float, bool]]]:
    """For every text of every item, in one batch: log p in nats of its scored tokens, and whether each is the likeliest.

    Raises MinisaError for logits that are not finite.
    """
    device = model.norm.weight.device
    rows = [(i, ids, scored) for i, item in enumerate(items) for ids, scored in item.texts]
    owners = torch.tensor([i for i, _, _ in rows], device=device)
    shared = torch.tensor([item.shared for item in items], device=device)
    longest = max(item.longest for item in items)
    cache = window_cache(model, len(rows), int(shared.max()) + longest)
    if shared.any():
        _feed_prefixes(model, _padded([item.texts[0][0][: item.shared] for item in items]).to(device), owners, cache)
    own = _padded([ids[items[i].shared : -1] for i, ids, _ in rows]).to(device)
    positions = shared[owners, None] + torch.arange(longest, device=device)
    hidden = model.hidden(own, positions, cache)  # [rows, longest, dim]
    ends = [len(ids) - 1 - items[i].shared for i, ids, _ in rows]
    sizes = [scored for _, _, scored in rows]
    states = torch.cat([x[end - size : end] for x, end, size in zip(hidden, ends, sizes, strict=True)])
    targets = torch.tensor([token for _, ids, scored in rows for token in ids[-scored:]], device=device)
    log_p, likeliest = _log_probabilities(model, states, targets)
    if not log_p.isfinite().all():
        raise MinisaError(NO_NUMBERS)
    results: list[list[tuple[float, bool]]] = [[] for _ in items]
    for (i, _, _), values, greedy in zip(rows, log_p.split(sizes), likeliest.split(sizes), strict=True):
        results[i].append((values.sum().item(), bool(greedy.all())))
    return results


def _feed_prefixes(model: Transformer, prefixes: Tensor, owners: Tensor, cache: StaticCache) -> None:
    """Feed prefixes [items, T], and copy their keys and values to the rows of the cache that begin with them."""
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
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])
