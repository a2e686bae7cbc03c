"""What a model makes of text: the loss of every token, and perplexity."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from minisa.cache import StaticCache
from minisa.model import Transformer

NO_NUMBERS = "the model's predictions are no numbers: its weights are damaged, or too large: fetch it again"
ROWS = 512  # positions whose logits are held at once: 100 MB for a vocabulary of 49,152


@torch.inference_mode()
def token_losses(model: Transformer, windows: Tensor, batch: int = 4) -> Tensor:
    """-log p(token | the window before it), in nats: fp32 [N, length - 1] on the CPU, for windows [N, length].

    batch: windows run together.
    """
    losses = []
    for part in windows.split(batch):
        hidden = final_hidden(model, part)
        losses.append(losses_of(model, hidden, part).cpu())
    return torch.cat(losses)


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


def losses_of(model: Transformer, hidden: Tensor, windows: Tensor) -> Tensor:
    """The losses fp32 [N, length - 1] of windows [N, length] whose final hidden states are [N, length, dim].

    The logits are never held for more than ROWS positions.
    """
    flat, targets = hidden[:, :-1].flatten(0, 1), windows[:, 1:].flatten().to(hidden.device)
    losses = [
        F.cross_entropy(model.head(rows).float(), wanted, reduction="none")
        for rows, wanted in zip(flat.split(ROWS), targets.split(ROWS), strict=True)
    ]
    return torch.cat(losses).view(len(windows), -1)
