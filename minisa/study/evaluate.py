"""What one variant scores: perplexity in windows of a text, and lm-eval's tasks."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import cross_entropy

from minisa.engine import LLM
from minisa.study.compare import Pair
from minisa.study.loss import token_losses
from minisa.study.progress import Progress


def perplexity_scores(
    llm: LLM, windows: Tensor, max_tokens: int, as_run: bool = False, label: str = "perplexity"
) -> dict[str, list[Pair]]:
    """For each of windows [N, length] the nats and the number of its tokens but the first.

    as_run: whether the model's runner computes them, one window at a time, and not PyTorch, max_tokens at a time.
    """
    scores: list[Pair] = []
    with Progress(label, len(windows)) as progress:
        for part in windows.split(1 if as_run else max(max_tokens // windows.shape[1], 1)):
            losses = losses_as_run(llm, part[0])[None] if as_run else token_losses(llm.model, part, batch=len(part))
            scores += [(row.double().sum().item(), float(len(row))) for row in losses]
            progress.update(len(scores))
    return {"perplexity": scores}


def losses_as_run(llm: LLM, window: Tensor) -> Tensor:
    """token_losses of one window [length] by what runs the model: fp32 [length - 1]."""
    logits = llm.logits(window.tolist())
    return cross_entropy(logits[:-1], window[1:].to(logits.device), reduction="none")
