"""The decoding loop: rows of a cache go on together, a token each at a time, and come and go between any two tokens.

The only wait for the device is to read the tokens just chosen; on a GPU the next step is queued before that.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from typing import NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from minisa.cache import StaticCache
from minisa.device import begin_reading, dtype_name
from minisa.errors import MinisaError, shown
from minisa.generation.row import Chunk, Options, Prefix, Row, reusable
from minisa.generation.runner import Runner, Step
from minisa.generation.sampling import NO_TOKEN, Chooser, Sampling
from minisa.text.tokenizer import Tokenizer


class DecodingLoop:
    """An iterator of chunks, one token of every row at a time, until no row is left; a prompt added starts it again.

    Each prompt is prefilled by itself, in the lowest row that is free, and its tokens are those of the prompt run
    alone: in the C++ step to the bit, and in fp32. Where PyTorch or a GPU computes in bf16, several rows, or guesses,
    are rounded otherwise than one, and a near tie may go the other way.
    A step takes in the rows up to the highest one in use, or all of them where the runner prepares for their number; a
    free row among them is computed too, and read by nobody.
    sampling: of all rows, but for the seed. most_rows: the rows of the cache to use, from the first on.
    """

    def __init__(
        self, runner: Runner, cache: StaticCache, tokenizer: Tokenizer, sampling: Sampling, most_rows: int
    ) -> None:
        self.most_rows = most_rows
        self._runner = runner
        self._cache = cache
        self._tokenizer = tokenizer
        self._device = cache.values.device
        self._chooser = Chooser.idle(sampling, most_rows, cache.length, runner.model.config.vocab_size, self._device)
        self._rows: dict[int, Row] = {}  # by the cache's row each is in
        self._added = 0
        self._ready: deque[tuple[int, Row, int]] = deque()  # tokens read that are not given out yet
        self._read_at = 0.0
        self._tokens = torch.zeros(most_rows, dtype=torch.int64, device=self._device)  # chosen last, for each row
        self._stepped = False  # whether the step after the tokens read is queued already
        self._step: Step | None = None
        self._positions = self._tokens  # where that step feeds its tokens
        self._places: set[int] = set()  # the rows it is for

    @property
    def free(self) -> int:
        """Rows that a prompt could take."""
        return self.most_rows - len(self._rows)

    def add(
        self, prompt: list[int], options: Options, held: list[int] | None = None, prefix: Prefix | None = None
    ) -> int:
        """Let a prompt take a free row; it is computed when the next chunk is asked for.

        options.sampling: the loop's, with the row's seed. held, prefix: as in `Row`.
        Returns the number its chunks carry: of the prompts added so far.
        """
        place = min(set(range(self.most_rows)) - self._rows.keys())
        row = Row(self._added, prompt, options, self._tokenizer, self._cache.length, held, prefix)
        self._rows[place] = row
        self._added += 1
        return row.number

    def cancel(self, number: int) -> None:
        """Take a prompt's row away, if it is still at work. Raises MinisaError for a number never given."""
        if number not in range(self._added):
            raise MinisaError(f"cancel: no row {shown(number)} has been added")
        self._rows = {place: row for place, row in self._rows.items() if row.number != number}

    def __iter__(self) -> Iterator[Chunk]:
        return self

    def __next__(self) -> Chunk:
        """Raises MinisaError, and lets the row go, where a row's logits are no numbers."""
        while self._rows:
            while self._ready:
                place, row, token = self._ready.popleft()
                if self._rows.get(place) is row:
                    return self._give_out(place, row, token)
            self._advance()
        raise StopIteration

    def _give_out(self, place: int, row: Row, token: int) -> Chunk:
        if token == NO_TOKEN:
            self._abandon(place, row)
        text = row.take(token)
        if row.finished is None:
            return Chunk(row.number, token, text)
        del self._rows[place]
        return Chunk(row.number, token, text, row.finished, row.stats(self._read_at, self._device))

    @torch.inference_mode()
    def _abandon(self, place: int, row: Row) -> NoReturn:
        """Free the place of a row whose logits are no numbers. The next one there must not meet its NaNs."""
        del self._rows[place]
        row.held.clear()
        own = self._cache.view(rows=slice(place, place + 1))
        own.keys.zero_()
        own.values.zero_()
        dtype = self._runner.model.norm.weight.dtype
        beyond, otherwise = f", or too large for {dtype_name(dtype)}", ", or take dtype fp32"
        if dtype == torch.float32:
            beyond = otherwise = ""
        raise MinisaError(
            f"row {row.number}: its logits are no numbers: the weights are damaged{beyond}: "
            f"fetch the model again{otherwise}"
        )

    @torch.inference_mode()
    def _advance(self) -> None:
        """Choose and read a token of every row: by a step, or by computing a prompt that has just been added."""
        begun = {place: row for place, row in self._rows.items() if row.begun}
        if begun and not self._stepped:
            self._decode(begun, unread=0)
        if len(begun) < len(self._rows):
            self._begin_rows()
        chosen_tokens = begin_reading(self._tokens)
        self._stepped = self._may_queue()
        if self._stepped:
            self._decode(self._rows, unread=1)
        chosen = chosen_tokens()
        self._read_at = time.perf_counter()
        for place, row in self._rows.items():
            row.first_token_at = row.first_token_at or self._read_at
            self._ready.append((place, row, chosen[place]))

    def _may_queue(self) -> bool:
        """Whether the step after one whose tokens are still to be read can be queued."""
        return self._runner.asynchronous and all(row.length < self._cache.length for row in self._rows.values())

    def _decode(self, rows: dict[int, Row], unread: int) -> None:
        """Feed the tokens chosen last and choose the next ones.

        unread: 1 where those chosen last have not been read, so that row.length does not count them yet; else 0.
        """
        width = self.most_rows if self._runner.fixed_batch else 1 + max(rows)
        choose = self._chooser.rows(slice(width))
        next_to = {place: row.length + unread - 1 for place, row in rows.items()}
        if self._step is None or self._places != rows.keys():
            self._step, self._places = self._runner.stepper(self._cache, choose), set(rows)
            # A row that no prompt is in begins at its first slot, where it reads least.
            self._positions = torch.tensor([next_to.get(place, 0) for place in range(width)], device=self._device)
        in_use = 1 + max(next_to.values())
        self._tokens, self._positions = self._step(self._tokens[:width], self._positions, in_use)
        choose.note(self._tokens)  # a graph keeps its own account

    def _begin_rows(self) -> None:
        """Compute the prompts of new rows and choose their first tokens."""
        self._step = None  # it knows nothing of them
        self._tokens = F.pad(self._tokens, (0, self.most_rows - len(self._tokens)))
        for place, row in self._rows.items():
            if not row.begun:
                here = slice(place, place + 1)
                choose = self._chooser.rows(here)
                choose.begin(row.prompt, row.sampling)
                last = torch.tensor([len(row.prompt) - 1], device=self._device)
                self._tokens[here] = choose(self._prefill(row, self._cache.view(rows=here)), last)

    def _prefill(self, row: Row, own: StaticCache) -> Tensor:
        """Logits [1, vocab_size] after a row's prompt, of which only what is not held yet is computed."""
        prompt = row.prompt
        row.reused = reusable(own, row.held, prompt)
        del row.held[0 if own.wraps else row.reused :]  # a prompt broken off may have written over a ring's tokens
        prefix = row.prefix
        if prefix is not None and (common := reusable(prefix.cache, prefix.tokens, prompt)) > row.reused:
            own.view(common).copy_(prefix.cache.view(common))
            row.reused = common
        logits = self._runner.prefill(torch.tensor([prompt[row.reused :]], device=self._device), row.reused, own)
        row.held[:] = prompt
        return logits
