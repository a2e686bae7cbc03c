"""The decoding loop: rows of a cache go on together, a token each at a time, and come and go between any two tokens.

    add ── a prompt takes the lowest free row
    next ─ 1. step      feed every row its last token and choose the next
           2. begin     compute the prompts of new rows and choose their first tokens
           3. queue     on a GPU, launch the step after that before its tokens are known to the host
           4. read      the tokens just chosen: the only wait for the device
           5. give out  one chunk a token, and let finished rows go

With guesses (speculate.py) stages 1 to 4 are one step that feeds several tokens of a row.
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
from minisa.errors import MinisaError
from minisa.generation.options import Options, Sampling
from minisa.generation.row import Chunk, Row
from minisa.generation.runner import Runner, Step
from minisa.generation.sampling import NO_TOKEN, Chooser
from minisa.generation.speculate import PromptLookup
from minisa.text.tokenizer import TextStream


class DecodingLoop:
    """An iterator of chunks until no row is left; a prompt added starts it again.

    A row's tokens are those of its prompt run alone: in the C++ step to the bit, and in fp32. Where PyTorch or a GPU
    computes in bf16, several rows, or guesses, are rounded otherwise than one, and a near tie may go the other way.
    A step takes in the rows up to the highest one in use, or all of them where the runner prepares for their number; a
    free row among them is computed too, and read by nobody.
    sampling: of all rows. n_rows: rows of the cache to use, from the first on.
    """

    def __init__(self, runner: Runner, cache: StaticCache, sampling: Sampling, n_rows: int) -> None:
        self.n_rows = n_rows
        self._runner = runner
        self._cache = cache
        self._device = cache.values.device
        self._chooser = Chooser.idle(sampling, n_rows, cache.length, runner.model.config.vocab_size, self._device)
        self._lookup: PromptLookup | None = None
        self._rows: dict[int, Row] = {}  # by the cache's row each is in
        self._added = 0
        self._ready: deque[tuple[int, Row, int]] = deque()  # tokens read that are not given out yet
        self._read_time = 0.0
        self._tokens = torch.zeros(n_rows, dtype=torch.int64, device=self._device)  # chosen last, for each row
        self._queued = False  # whether the step after the tokens read has been launched already
        self._step: Step | None = None
        self._positions = self._tokens  # where that step feeds its tokens
        self._places: set[int] = set()  # the rows it is for
        for tokens in cache.tokens[n_rows:]:
            tokens.clear()  # a graph's bucket may be wider than n_rows

    @property
    def free(self) -> int:
        """Rows that a prompt could take."""
        return self.n_rows - len(self._rows)

    def add(self, prompt: list[int], options: Options, stream: TextStream) -> int:
        """Let a prompt take a free row; it is computed when the next chunk is asked for.

        Returns the number its chunks carry: of the prompts added so far. speculate is for a loop of one row.
        """
        place = min(set(range(self.n_rows)) - self._rows.keys())
        row = Row(self._added, prompt, options, stream, self._cache.length)
        self._rows[place] = row
        self._added += 1
        if options.speculate:
            self._lookup = PromptLookup(prompt, self._runner.price(self._cache))
        return row.number

    def cancel(self, number: int) -> None:
        """Take a prompt's row away, if it is still at work. Raises MinisaError for a number never given."""
        if number not in range(self._added):
            raise MinisaError(f"cancel: no row {number!r} has been added")
        self._rows = {place: row for place, row in self._rows.items() if row.number != number}

    def __iter__(self) -> Iterator[Chunk]:
        return self

    def __next__(self) -> Chunk:
        """Raises MinisaError, and lets the row go, where a row's logits are not finite."""
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
        if row.last is not None:
            self._cache.tokens[place].append(row.last)  # it was fed to choose this one
        text = row.take(token)
        if row.finished is None:
            return Chunk(row.number, token, text)
        del self._rows[place]
        return Chunk(row.number, token, text, row.finished, row.stats(self._read_time, self._device))

    @torch.inference_mode()
    def _abandon(self, place: int, row: Row) -> NoReturn:
        """Free the place of a row whose logits are not finite. The next one there must not meet its NaNs."""
        del self._rows[place]
        own = self._cache.view(rows=slice(place, place + 1))
        own.tokens[0].clear()
        own.keys.zero_()
        own.values.zero_()
        dtype = dtype_name(self._runner.model.norm.weight.dtype)
        raise MinisaError(
            f"row {row.number}: its logits are not finite: the weights are damaged, or too large for {dtype}: "
            "fetch the model again, or take dtype fp32"
        )

    @torch.inference_mode()
    def _advance(self) -> None:
        """Choose and read the next tokens of every row."""
        guesses = self._guess()
        tried = len(guesses) if guesses and not self._queued else 0  # a step launched before there was a guess counts
        if tried:
            self._verify(guesses)
        else:
            self._advance_by_one(queue=not guesses)
        if self._lookup is not None:
            self._lookup.settle(tried, len(self._ready) - 1)
            for _, _, token in self._ready:
                self._lookup.append(token)

    def _advance_by_one(self, queue: bool) -> None:
        begun = {place: row for place, row in self._rows.items() if row.begun}
        if begun and not self._queued:
            self._decode(begun, unread=0)
        if len(begun) < len(self._rows):
            self._begin_rows()
        read = begin_reading(self._tokens)
        room = all(row.length < self._cache.length for row in self._rows.values())
        self._queued = queue and room and self._runner.asynchronous
        if self._queued:
            self._decode(self._rows, unread=1)
        chosen = read()
        self._read_time = time.perf_counter()
        for place, row in self._rows.items():
            row.first_token_time = row.first_token_time or self._read_time
            self._ready.append((place, row, chosen[place]))

    def _decode(self, rows: dict[int, Row], unread: int) -> None:
        """Feed the tokens chosen last and choose the next ones.

        unread: 1 where those chosen last have not been read, so that row.length does not count them yet; else 0.
        """
        width = self.n_rows if self._runner.fixed_batch else 1 + max(rows)
        choose = self._chooser.rows(slice(width))
        next_positions = {place: row.length + unread - 1 for place, row in rows.items()}
        if self._step is None or self._places != rows.keys():
            self._step, self._places = self._runner.stepper(self._cache, choose), set(rows)
            for place in set(range(width)) - rows.keys():
                self._cache.tokens[place].clear()  # a free row is fed from its first slot on, where it reads least
            self._positions = torch.tensor([next_positions.get(i, 0) for i in range(width)], device=self._device)
        in_use = 1 + max(next_positions.values())
        self._tokens, self._positions = self._step(self._tokens[:width], self._positions, in_use)
        choose.note(self._tokens)  # a graph keeps its own account

    def _begin_rows(self) -> None:
        """Compute the prompts of new rows and choose their first tokens."""
        self._step = None  # it knows nothing of them
        self._tokens = F.pad(self._tokens, (0, self.n_rows - len(self._tokens)))
        for place, row in self._rows.items():
            if not row.begun:
                here = slice(place, place + 1)
                choose = self._chooser.rows(here)
                choose.begin(row.prompt, row.options.seed)  # type: ignore[arg-type]  # one a row by now
                last = torch.tensor([len(row.prompt) - 1], device=self._device)
                self._tokens[here] = choose(self._prefill(row, self._cache.view(rows=here)), last)

    def _prefill(self, row: Row, own: StaticCache) -> Tensor:
        """Logits [1, vocab_size] after a row's prompt, of which only what `own` does not hold yet is computed."""
        prompt, prefix, held = row.prompt, row.options.prefix, own.tokens[0]
        row.reused = own.reusable(prompt)
        del held[0 if own.wraps else row.reused :]  # a prompt broken off may have overwritten a ring's tokens
        if prefix is not None and (common := prefix.cache.reusable(prompt)) > row.reused:
            own.view(common).copy_(prefix.cache.view(common))
            row.reused = common
        logits = self._runner.prefill(torch.tensor([prompt[row.reused :]], device=self._device), row.reused, own)
        held[:] = prompt
        return logits

    def _guess(self) -> list[int]:
        """Tokens that may come next, if this loop guesses ahead and its row has begun."""
        row = self._rows.get(0)
        if self._lookup is None or row is None or not row.begun:
            return []
        return self._lookup.guess(self._cache.length - row.length)

    def _verify(self, guesses: list[int]) -> None:
        """Feed the last token and guesses after it; what is chosen up to the first wrong one is ready."""
        row, cache = self._rows[0], self._cache.view(rows=slice(1))
        position = row.length - 1
        fed = torch.tensor([[row.last, *guesses]], device=self._device)
        tokens = self._chooser.confirm(self._runner.verify(fed, position, cache), guesses, position)
        self._tokens = torch.tensor(tokens[-1:], device=self._device)
        self._ready.extend((0, row, token) for token in tokens)
        self._read_time = time.perf_counter()
        self._step = None  # one that goes on by itself has missed these tokens
