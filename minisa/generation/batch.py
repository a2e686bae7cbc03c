"""Batch: prompts that come and go while others are being continued."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

from minisa.errors import MinisaError
from minisa.generation.lease import Lease
from minisa.generation.loop import DecodingLoop
from minisa.generation.prompts import Prompt
from minisa.generation.row import Chunk, Options, Prefix
from minisa.text.chat import Message


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
        self, loop: DecodingLoop, request: Callable[..., tuple[list[int], Options]], lease: Lease,
        alone: AbstractContextManager[Any],
    ) -> None:  # fmt: skip
        self._loop = loop
        self._request = request
        self._lease = lease
        self._alone = alone

    @property
    def free(self) -> int:
        """Rows that a prompt could take now."""
        return self._loop.free

    def add(
        self,
        prompt: Prompt | Sequence[Message],
        *,
        max_new_tokens: int | None = None,
        stop: str | Sequence[str] = (),
        stop_ids: Iterable[int] | None = None,
        prefix: Prefix | None = None,
        seed: int | None = None,
    ) -> int:
        """Let a prompt take a free row. It is computed when the next chunk is asked for, and the other rows wait.

        prompt: text or token ids, to be continued as by `LLM.generate`, or messages, to be answered as by `LLM.chat`;
            so are the options.
        Returns the number that its chunks carry as `row`: 0 for the batch's first prompt, then 1, and so on.
        Raises MinisaError as `LLM.generate` does, and if every row is taken.
        """
        ids, options = self._request(
            prompt, max_new_tokens=max_new_tokens, stop=stop, stop_ids=stop_ids, prefix=prefix, seed=seed
        )
        with self._lease():
            if not self.free:
                raise MinisaError(
                    f"batch: all {self._loop.most_rows} rows are taken: go on until one ends, cancel one, or load with "
                    "a larger max_batch"
                )
            return self._loop.add(ids, options, prefix=prefix)

    def cancel(self, row: int) -> None:
        """End a row, by the number `add` returned: no chunk of it follows. One that has ended stays as it is.

        Raises MinisaError for a number that `add` never returned.
        """
        with self._alone:
            self._loop.cancel(row)

    def __iter__(self) -> Iterator[Chunk]:
        return self

    def __next__(self) -> Chunk:
        """Raises MinisaError once another generation has begun on the model, after an interrupted step, and for logits
        that are no numbers."""
        with self._lease():
            chunk = next(self._loop, None)
        if chunk is None:
            raise StopIteration
        return chunk
