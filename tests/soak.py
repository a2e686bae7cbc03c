"""A long session with interrupts, by hand: `python -m tests.soak --turns 1000 --model smollm2-135m`.

Turns go through chat.py's own `answer` and `command`, with Ctrl-C at random: between two chunks, or anywhere at all.
Every few turns the answer must be the one that a fresh session gives to the same messages: of eager PyTorch in fp32, or
with --compile of the C++ step in bf16. As memory must not grow it is printed along the way. Without --model, a tiny
random model in a folder of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import random
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import chat
from minisa import LLM, load
from minisa.errors import MinisaError
from minisa.text.conversation import Conversation
from tests.loadable import chat_model
from tests.memory import resident

TEXTS = (
    "What is the capital of France?",
    "And what river flows through it?",
    "Write a line of Python that adds 1234 and 5678.",
    "Schreib mir einen Satz über Füße. 你好 🙂",
    "Why?",
    "List " + ", ".join(f"item {n}" for n in range(20)) + " in reverse order.",
)
COMMANDS = ("/reset", "/system Answer like a pirate.", "/system", "/stats", "/sa", "/help", "/nonsense")


class Screen(io.StringIO):
    """What a terminal shows, and somebody who presses Ctrl-C when so many chunks are on it.

    One for all turns, as a terminal is: click keeps every stream that it has written to.
    """

    patience: int | None = None

    def clear(self, patience: int | None) -> None:
        self.seek(0)
        self.truncate()
        self.patience = patience

    def write(self, text: str) -> int:
        if self.patience == 0:
            self.patience = None
            raise KeyboardInterrupt
        if self.patience is not None:
            self.patience -= 1
        return super().write(text)


@contextlib.contextmanager
def interrupted_within(seconds: float | None) -> Iterator[None]:
    """Ctrl-C wherever the program is by then, unless it has left the block."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds or 0)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Soak:
    """counts: of what happened. memory: (turns, bytes resident)."""

    def __init__(self, model: str, seed: int, every: int, **loading: Any) -> None:
        self.llm, self.other = (load(model, device="cpu", **loading) for _ in range(2))
        self.chance = random.Random(seed)
        self.every = every
        self.out, self.err = Screen(), Screen()
        self.counts: Counter[str] = Counter()
        self.memory: list[tuple[int, int]] = []

    def run(self, turns: int, report: int, **options: Any) -> None:
        session = session_of(self.llm, None, options)
        for turn in range(turns + 1):
            if turn % report == 0:
                gc.collect()
                self.memory.append((turn, resident("VmRSS")))
                print(f"{turn:>5} turns  {self.memory[-1][1] / 2**20:7.1f} MiB  {dict(self.counts)}", flush=True)
            if turn < turns:
                self.turn(session, compare=turn % self.every == 0)

    def turn(self, session: chat.Session, *, compare: bool) -> None:
        if self.chance.random() < 0.1:
            with contextlib.suppress(MinisaError), contextlib.redirect_stderr(self.err):
                chat.command(session, self.chance.choice(COMMANDS))
            self.counts["commands"] += 1
        conversation = session.conversation
        text, before, system = self.chance.choice(TEXTS), conversation.turns, conversation.system
        kind = self.chance.choice(("none", "none", "between chunks", "anywhere"))
        self.out.clear(self.chance.randrange(12) if kind == "between chunks" else None)
        self.err.clear(None)
        began = time.monotonic()
        try:
            with (
                contextlib.redirect_stdout(self.out),
                contextlib.redirect_stderr(self.err),
                interrupted_within(0.001 + self.chance.random() * 0.3 if kind == "anywhere" else None),
            ):
                chat.answer(session, text)
            self.counts["whole answers"] += 1
            whole = True
        except KeyboardInterrupt:
            self.counts[f"interrupted {kind}"] += 1
            whole = False
        self.counts["seconds"] += round(time.monotonic() - began)
        self.counts["turns dropped"] += conversation.forgotten
        if compare and conversation.turns is not before:  # something was said
            said = conversation.turns[-1]["content"]
            expected = fresh_answer(self.other, before, system, text, session.options)
            same = said == expected if whole else expected.startswith(said)
            assert same, f"{said!r}, a fresh session says {expected!r} to {[*before, text]}"
            self.counts["compared"] += 1


def fresh_answer(llm: LLM, turns: list[Any], system: str | None, text: str, options: dict[str, Any]) -> str:
    """What a session answers that has nothing in its cache."""
    llm.cache.tokens[0].clear()
    llm.cache.values.zero_()
    llm.cache.keys.zero_()
    session = session_of(llm, system, options)
    session.conversation.turns = turns
    return "".join(chunk.text for chunk in session.send(text))


def session_of(llm: LLM, system: str | None, options: dict[str, Any]) -> chat.Session:
    return chat.Session(llm, "", {}, options, False, Conversation(system))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=1000)
    parser.add_argument("--model")
    parser.add_argument("--sa")
    parser.add_argument("--speculate", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--max-new-tokens", type=int, default=16)
    parser.add_argument("--max-seq-len", type=int, default=256)
    parser.add_argument("--every", type=int, default=10, help="Turns from one comparison to the next.")
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        shape = {"dim": 64, "n_heads": 4, "n_kv_heads": 2, "head_dim": 32, "hidden_dim": 96}
        model = flags.model or str(chat_model(Path(folder), **shape))
        how = {"compile": flags.compile, "dtype": "bf16" if flags.compile else "fp32"}
        soak = Soak(model, flags.seed, flags.every, sa=flags.sa, max_seq_len=flags.max_seq_len, **how)
        print(soak.llm.runner.name)
        soak.run(
            flags.turns,
            report=max(flags.turns // 10, 1),
            max_new_tokens=flags.max_new_tokens,
            repetition_penalty=1.1,
            speculate=flags.speculate,
        )


if __name__ == "__main__":
    main()
