"""How likely a model finds text: the loss of every token, perplexity, and log-likelihoods of answers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from minisa.cache import StaticCache
from minisa.engine import LLM
from minisa.errors import MinisaError
from minisa.model import Transformer
from minisa.runners.eager import prefill_chunks
from minisa.study.compare import Pair
from minisa.study.progress import Progress

NO_NUMBERS = "the model's predictions are no numbers: its weights are damaged, or too large: fetch it again"
ROWS = 512  # positions whose logits are held at once: 100 MB for a vocabulary of 49,152

Scored = tuple[list[int], int]  # a text's token ids, and how many of its last ones are scored
Score = tuple[float, bool]  # log p in nats of the scored tokens, and whether each of them is the likeliest


@torch.inference_mode()
def token_losses(model: Transformer, windows: Tensor, batch: int = 4) -> Tensor:
    """-log p(token | the window before it), in nats: fp32 [N, length - 1] on the CPU, for windows [N, length].

    batch: windows run together.
    """
    losses = []
    for part in windows.split(batch):
        hidden = final_hidden(model, part)[:, :-1].flatten(0, 1)
        targets = part[:, 1:].flatten().to(hidden.device)
        for rows, wanted in zip(hidden.split(ROWS), targets.split(ROWS), strict=True):
            losses.append(F.cross_entropy(model.head(rows).float(), wanted, reduction="none").cpu())
    return torch.cat(losses).view(len(windows), -1)


def losses_as_run(llm: LLM, window: Tensor) -> Tensor:
    """token_losses of one window [length], by the model's runner and with its kind of cache: fp32 [length - 1]."""
    logits = llm.logits(window.tolist())
    return F.cross_entropy(logits[:-1], window[1:].to(logits.device), reduction="none").cpu()


def window_scores(llm: LLM, windows: Tensor, as_run: bool = False, label: str = "perplexity") -> list[Pair]:
    """The nats and the number of tokens, the first apart, of each of windows [N, length]; exp of the ratio of their
    sums is the perplexity.

    as_run: whether the model's runner computes them, and not PyTorch. label: what the progress line says.
    """
    scores: list[Pair] = []
    with Progress(label, len(windows)) as progress:
        for part in windows.split(4):
            losses = (
                torch.stack([losses_as_run(llm, window) for window in part])
                if as_run
                else token_losses(llm.model, part)
            )
            scores += [(row.double().sum().item(), float(len(row))) for row in losses]
            progress.update(len(scores))
    return scores


def perplexity(losses: Tensor) -> float:
    """exp of the mean loss."""
    return losses.double().mean().exp().item()


def window_cache(model: Transformer, batch: int, length: int) -> StaticCache:
    """A cache for `batch` windows of `length` tokens that keeps every one of them, with a sliding window too."""
    weight = model.norm.weight
    return StaticCache.allocate(
        model.config, model.plan, batch=batch, max_seq_len=length, device=weight.device, dtype=weight.dtype, ring=False
    )


def final_hidden(model: Transformer, windows: Tensor) -> Tensor:
    """The final hidden states [N, length, dim] of windows [N, length], each from position 0, after the last norm."""
    tokens = windows.to(model.norm.weight.device)
    batch, length = tokens.shape
    positions = torch.arange(length, device=tokens.device).expand(batch, -1)
    return model.hidden(tokens, positions, window_cache(model, batch, length))


@torch.inference_mode()
def score(model: Transformer, texts: Sequence[Scored]) -> list[Score]:
    """Scores of texts together; the tokens that all begin with are fed once.

        texts     A B C D E x y | A B C D E z      x, y and z are scored
        prefix    A B C D       fed once
        rows      E x | E       the tokens left but the last, padded on the right; E and x predict what is scored

    Raises MinisaError for logits that are not finite.
    """
    first, device = texts[0][0], model.norm.weight.device
    limit = min(len(ids) - scored - 1 for ids, scored in texts)
    shared = next((i for i in range(limit) if any(ids[i] != first[i] for ids, _ in texts)), limit)
    longest = max(len(ids) for ids, _ in texts) - 1 - shared
    rows = [ids[shared:-1] + [0] * (longest - len(ids[shared:-1])) for ids, _ in texts]
    cache = window_cache(model, len(texts), shared + longest)
    if shared:
        once = window_cache(model, 1, shared)
        for _ in prefill_chunks(model, torch.tensor([first[:shared]], device=device), 0, once):
            pass
        cache.keys[:, :, :, :shared] = once.keys  # [layers, rows, heads, slots, head_dim]
        cache.values[:, :, :, :shared] = once.values
    fed = prefill_chunks(model, torch.tensor(rows, device=device), shared, cache)
    hidden = torch.cat(list(fed), dim=1)  # [rows, longest, dim]
    scores = []
    for (ids, scored), states in zip(texts, hidden, strict=True):
        end = len(ids) - 1 - shared
        targets = torch.tensor(ids[-scored:], device=device)
        total, greedy = 0.0, True
        for part, wanted in zip(states[end - scored : end].split(ROWS), targets.split(ROWS), strict=True):
            logits = model.head(part).float()
            log_p = logits.gather(1, wanted[:, None])[:, 0] - logits.logsumexp(1)
            if not log_p.isfinite().all():
                raise MinisaError(NO_NUMBERS)
            total += log_p.double().sum().item()
            greedy &= bool((logits.argmax(1) == wanted).all())
        scores.append((total, greedy))
    return scores
