"""Conversation: the turns of a chat, kept within the context."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from minisa.engine import LLM
from minisa.generation.row import Chunk, Stats
from minisa.text.dialog import Message


class Conversation:
    """The turns so far. What of them is in the model's cache is not computed again.

    raw: no chat format and no memory; each text is continued as it stands. options: those of `LLM.generate`.
    """

    def __init__(self, llm: LLM, system: str | None = None, raw: bool = False, **options: Any) -> None:
        self.llm = llm
        self.system = system
        self.raw = raw
        self.options = options
        self.turns: list[Message] = []
        self.forgotten = 0  # messages dropped to make room for the last answer
        self.last: Stats | None = None

    def reset(self, system: str | None) -> None:
        self.system = system
        self.turns = []

    def send(self, text: str) -> Generator[Chunk, None, None]:
        """Stream the answer. It becomes a turn as far as it was given out, also when the caller stops early.

        Raises MinisaError, the turns unchanged, when the text does not fit the context even by itself.
        """
        self.last = None
        if self.raw:
            for chunk in self.llm.generate(text, **self.options):
                self.last = chunk.stats
                yield chunk
            return
        kept = self._within_context([*self.turns, {"role": "user", "content": text}])
        said = ""
        try:
            for chunk in self.llm.chat(self._with_system(kept), **self.options):
                said += chunk.text
                self.last = chunk.stats
                yield chunk
        finally:
            if said:
                self.turns = [*kept, {"role": "assistant", "content": said}]

    def _within_context(self, turns: list[Message]) -> list[Message]:
        """The turns less the oldest ones, so that up to a quarter of the context is free for the answer."""
        context = self.llm.cache.length
        limit = context - min(self.options.get("max_new_tokens") or context, context // 4)
        self.forgotten = 0
        while len(turns) > 1 and self._length(turns) > limit:
            turns = turns[2:]  # a question and its answer
            self.forgotten += 2
        return turns

    def _length(self, turns: list[Message]) -> int:
        return len(self.llm.chat_template.ids(self._with_system(turns)))

    def _with_system(self, turns: list[Message]) -> list[Message]:
        return turns if self.system is None else [{"role": "system", "content": self.system}, *turns]
