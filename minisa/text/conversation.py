"""Conversation: the turns of a chat, kept within the context."""

from __future__ import annotations

from collections.abc import Callable

from minisa.text.chat import Message


class Conversation:
    """The system prompt and the turns so far.

    forgotten: how many messages were dropped to make room for the last answer.
    """

    def __init__(self, system: str | None = None) -> None:
        self.reset(system)

    def reset(self, system: str | None) -> None:
        self.system = system
        self.turns: list[Message] = []
        self.forgotten = 0

    def messages_for(
        self, text: str, count_tokens: Callable[[list[Message]], int], context: int, max_new_tokens: int | None
    ) -> list[Message]:
        """The messages to answer: the system prompt, the turns that still fit, and `text`.

        The oldest questions are dropped with their answers until a quarter of the context (in tokens, as count_tokens
        counts messages) is free, or max_new_tokens if that is less. The last message stays in any case.
        """
        limit = context - min(max_new_tokens or context, context // 4)
        turns: list[Message] = [*self.turns, {"role": "user", "content": text}]
        self.forgotten = 0
        while len(turns) > 1 and count_tokens(self._with_system(turns)) > limit:
            turns = turns[2:]
            self.forgotten += 2
        return self._with_system(turns)

    def add_answer(self, messages: list[Message], answer: str) -> None:
        """Keep what messages_for has given and the answer to it, which may have been stopped early."""
        spoken = messages if self.system is None else messages[1:]
        self.turns = [*spoken, {"role": "assistant", "content": answer}]

    def _with_system(self, turns: list[Message]) -> list[Message]:
        return turns if self.system is None else [{"role": "system", "content": self.system}, *turns]
