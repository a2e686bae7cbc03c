"""From logits to tokens, on the device, without waiting for it.

A sampler is a composition of small functions of logits [B, vocab_size]. All the randomness of a row is drawn up
front, one uniform number for each position, so that a step stays a pure function: from the same logits the same seed
chooses the same text in eager, compiled and graph mode, in a batch and alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from minisa.device import one_torch_thread
from minisa.generation.options import Sampling

NO_TOKEN = -1  # chosen where a row's logits are not finite: the host finds it among the tokens it reads
NUCLEUS = 1024  # of the likeliest tokens, which mostly reach top_p


def choose(sampling: Sampling, logits: Tensor, uniforms: Tensor | None, seen: Tensor | None = None) -> Tensor:
    """Tokens [B] from logits [B, vocab_size]; NO_TOKEN where a logit is NaN, or the greatest infinite.

    uniforms [B], in [0, 1); greedy needs none. seen [B, vocab_size] bool: the text so far, to be penalized.
    """
    logits = logits.float()
    if seen is not None:
        logits = penalize(logits, seen, sampling.repetition_penalty)
    if sampling.greedy:
        tokens = logits.argmax(dim=-1)  # a NaN, if there is one
        best = logits.gather(-1, tokens[:, None])[:, 0]
        return tokens.masked_fill((best - best).isnan(), NO_TOKEN)
    assert uniforms is not None
    return draw(filtered(sampling, logits).softmax(dim=-1), uniforms)


def filtered(sampling: Sampling, logits: Tensor) -> Tensor:
    """Logits [B, vocab_size] fp32 over the temperature, refused tokens at -inf."""
    logits = logits / sampling.temperature
    if sampling.top_k:
        logits = keep_top_k(logits, sampling.top_k)
    if sampling.top_p < 1:
        logits = keep_top_p(logits, sampling.top_p)
    if sampling.min_p > 0:
        logits = keep_min_p(logits, sampling.min_p)
    return logits


@dataclass(frozen=True, slots=True)
class Chooser:
    """A Sampling at work on rows, all of its state on the device.

    uniforms [B, max_seq_len]: a number for each position; None for greedy. seen [B, vocab_size] bool, kept up to date:
    each row's text so far; None where repetitions are not penalized.
    """

    sampling: Sampling
    batch: int
    uniforms: Tensor | None = None
    seen: Tensor | None = None

    # What runs between C++ steps keeps to one thread: theirs need the cores.

    @classmethod
    @one_torch_thread()
    def idle(cls, sampling: Sampling, batch: int, max_seq_len: int, vocab_size: int, device: torch.device) -> Chooser:
        """For rows that no prompt is in yet."""
        uniforms = None if sampling.greedy else torch.zeros(batch, max_seq_len, device=device)
        penalizes = sampling.repetition_penalty != 1
        seen = torch.zeros(batch, vocab_size, dtype=torch.bool, device=device) if penalizes else None
        return cls(sampling, batch, uniforms, seen)

    @classmethod
    def greedy(cls, batch: int) -> Chooser:
        """The likeliest tokens of so many rows."""
        return cls(Sampling(), batch)

    @one_torch_thread()
    def begin(self, prompt: Sequence[int], seed: int | None) -> None:
        """A prompt comes into these rows, which are one."""
        if self.uniforms is not None:
            self.uniforms.copy_(uniforms_of(seed, self.uniforms.shape[1]))
        if self.seen is not None:
            self.seen.zero_()
            self.seen[:, list(prompt)] = True

    @one_torch_thread()
    def __call__(self, logits: Tensor, positions: Tensor) -> Tensor:
        """The tokens [B] to follow those at positions [B], which logits [B, vocab_size] were computed for."""
        uniforms = None if self.uniforms is None else self.uniforms.gather(1, positions[:, None])[:, 0]
        tokens = choose(self.sampling, logits, uniforms, self.seen)
        self.note(tokens)
        return tokens

    def note(self, tokens: Tensor) -> None:
        """Tokens [B], or several a row [B, N], have come to the rows' texts."""
        if self.seen is not None:
            self.seen.scatter_(1, tokens.clamp(min=0).view(self.batch, -1), True)  # NO_TOKEN ends its row

    def rows(self, rows: slice) -> Chooser:
        """Some of the rows; the memory is shared."""
        uniforms, seen = (None if state is None else state[rows] for state in (self.uniforms, self.seen))
        return replace(self, batch=len(range(self.batch)[rows]), uniforms=uniforms, seen=seen)

    def confirm(self, logits: Tensor, guesses: list[int], position: int) -> list[int]:
        """Of one row: the tokens that follow the one at a position and the N guesses after it, up to the first that
        was not guessed: 1 to 1 + N of them. logits [1 + N, vocab_size] were computed for these."""
        # On a CPU each takes as long as the first, and a wrong one saves the rest; a GPU is waited for once.
        confirm = self.confirm_one_by_one if logits.is_cpu else self.confirm_at_once
        return confirm(logits, guesses, position)

    def confirm_one_by_one(self, logits: Tensor, guesses: list[int], position: int) -> list[int]:
        """As `confirm`."""
        tokens: list[int] = []
        for i, guess in enumerate([*guesses, None]):
            positions = torch.tensor([position + i], device=logits.device)
            tokens.append(int(self(logits[i : i + 1], positions)))
            if tokens[-1] != guess:
                break
        return tokens

    def confirm_at_once(self, logits: Tensor, guesses: list[int], position: int) -> list[int]:
        """As `confirm`: row i of a Chooser of its own has the text and the first i guesses behind it."""
        n_rows = len(logits)
        uniforms = None if self.uniforms is None else self.uniforms.expand(n_rows, -1)
        seen = None if self.seen is None else self.seen.repeat(n_rows, 1)
        if seen is not None:
            for i, guess in enumerate(guesses, 1):
                seen[i:, guess] = True
        positions = torch.arange(position, position + n_rows, device=logits.device)
        tokens: list[int] = replace(self, batch=n_rows, uniforms=uniforms, seen=seen)(logits, positions).tolist()
        n_right = next((i for i, guess in enumerate(guesses) if tokens[i] != guess), len(guesses))
        self.note(torch.tensor([tokens[: n_right + 1]], device=logits.device))
        return tokens[: n_right + 1]


def uniforms_of(seed: int | None, n: int) -> Tensor:
    """A number in [0, 1) for each of a row's positions: [n] fp32, on the CPU; fresh ones for None."""
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return torch.rand(n, generator=generator)


def penalize(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make tokens already in the text less likely (Keskar et al., arXiv 1909.05858, section 4.1)."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """The k most likely tokens (and those equal to the last of them)."""
    threshold = logits.topk(min(k, logits.shape[-1]), dim=-1).values[:, -1:]
    return logits.masked_fill(logits < threshold, float("-inf"))


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """The fewest most likely tokens whose probabilities reach p (Holtzman et al., arXiv 1904.09751), and those equal
    to the last of them."""
    probabilities = logits.softmax(dim=-1)
    # A CPU sorts a vocabulary in as long as a small model's step takes; a GPU's graph cannot wait to see if it must.
    few = logits.is_cpu and logits.shape[-1] > NUCLEUS
    ordered = probabilities.topk(NUCLEUS).values if few else probabilities.sort(descending=True).values
    if few and (ordered.sum(dim=-1) < p).any():
        ordered = probabilities.sort(descending=True).values
    before = ordered.cumsum(dim=-1) - ordered  # what the more likely tokens already reach
    refused = (before >= p) & (before > 0)  # never the likeliest
    threshold = ordered.masked_fill(refused, float("inf")).amin(dim=-1, keepdim=True)
    return logits.masked_fill(probabilities < threshold, float("-inf"))


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """Tokens at least p times as likely as the most likely one (Nguyen et al., arXiv 2407.01082)."""
    return logits.masked_fill(logits < logits.amax(dim=-1, keepdim=True) + math.log(p), float("-inf"))


def draw(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """The token at which the running sum of probabilities [B, vocab_size] passes uniforms [B]: [B].

    NO_TOKEN where they are NaN.
    """
    sums = probabilities.cumsum(dim=-1)
    total = sums[:, -1]
    # Strictly under the total, so that rounding never picks a refused token behind the last allowed one.
    target = torch.minimum(uniforms * total, torch.nextafter(total, torch.zeros_like(total)))
    tokens = torch.searchsorted(sums, target[:, None], right=True).squeeze(-1).clamp(max=sums.shape[-1] - 1)
    if not probabilities.is_cpu:
        tokens = none_refused(tokens, probabilities)
    return tokens.masked_fill(total.isnan(), NO_TOKEN)


def none_refused(tokens: Tensor, probabilities: Tensor) -> Tensor:
    """Tokens [B], the likeliest in place of one of probability 0: a GPU sums in parallel, and its running sums, not
    quite in order, may lead to one (https://github.com/pytorch/pytorch/issues/21780)."""
    refused = probabilities.gather(-1, tokens[:, None])[:, 0] == 0
    return torch.where(refused, probabilities.argmax(dim=-1), tokens)
