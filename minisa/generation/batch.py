"""Batch: prompts that come and go while others are being continued."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from minisa.errors import MinisaError
from minisa.generation.loop import DecodingLoop
from minisa.generation.options import Options
from minisa.generation.row import Chunk
from minisa.text.tokenizer import TextStream

Prompt = str | Sequence[int]  # text, or token ids
PreparedRow = tuple[list[int], Options, TextStream]  # what DecodingLoop.add takes


class Batch:
    """Rows that are continued together, made by `LLM.batch`; an iterator of their chunks.

        batch = llm.batch(temperature=0.8)
        batch.add("One prompt")
        for chunk in batch:
            if waiting and batch.free:
                batch.add(waiting.pop(), max_new_tokens=100)

    Iteration ends when no row is left, and can be taken up again once another prompt is added. What a row says is what
    its prompt says alone with the same options, whatever comes and goes beside it (for near ties see DecodingLoop).
    """

    def __init__(
        self,
        loop: DecodingLoop,
        turn: Callable[[], AbstractContextManager[None]],
        prepare: Callable[[Any, dict[str, Any]], PreparedRow],
    ) -> None:
        """A step, or a change of the rows, happens inside of `with turn():`. prepare: what `add` is given, for the
        loop's own add."""
        self._loop = loop
        self._turn = turn
        self._prepare = prepare

    @property
    def free(self) -> int:
        """Rows that a prompt could take now."""
        return self._loop.free

    def add(self, prompt: Prompt | Sequence[Mapping[str, Any]], **options: Any) -> int:
        """Let a prompt take a free row. It is computed when the next chunk is asked for, and the other rows wait.

        prompt: text or token ids, to be continued as by `LLM.generate`, or messages, to be answered as by `LLM.chat`.
        options: seed, max_new_tokens, stop, stop_ids and prefix, as in `Options`; sampling is the batch's.
        Returns the number that its chunks carry as `row`: 0 for the batch's first prompt, then 1, and so on.
        Raises MinisaError as `LLM.generate` does, and if every row is taken.
        """
        row = self._prepare(prompt, options)
        with self._turn():
            if not self.free:
                raise MinisaError(
                    f"batch: all {self._loop.n_rows} rows are taken: go on until one ends, cancel one, or load with "
                    "a larger max_batch"
                )
            return self._loop.add(*row)

    def cancel(self, row: int) -> None:
        """End a row, by the number `add` returned: no chunk of it follows. One that has ended stays as it is.

        Raises MinisaError for a number that `add` never returned.
        """
        with self._turn():
            self._loop.cancel(row)

    def __iter__(self) -> Iterator[Chunk]:
        return self

    def __next__(self) -> Chunk:
        """Raises MinisaError once another generation has begun on the model, after an interrupted step, and for logits
        that are not finite."""
        with self._turn():
            chunk = next(self._loop, None)
        if chunk is None:
            raise StopIteration
        return chunk
