"""A long session with interrupts, by hand: `python -m tests.soak --turns 1000 --model smollm2-135m`.

Turns go through chat.py's own `answer` and `command`, with Ctrl-C anywhere at all. Every few turns the answer must be
the one that a fresh session gives to the same messages, and as memory must not grow it is printed along the way.
Without --model, a tiny random model in a folder of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import random
import signal
import tempfile
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
    "Schreib mir einen Satz über Füße. 你好 🙂",
    "Why?",
    "List " + ", ".join(f"item {n}" for n in range(20)) + " in reverse order.",
)
COMMANDS = ("/reset", "/system Answer like a pirate.", "/system", "/stats", "/sa", "/help", "/nonsense")
SCREEN = io.StringIO()  # one for all turns: click keeps every stream that it has written to


@contextlib.contextmanager
def interrupted_after(seconds: float) -> Iterator[None]:
    """Ctrl-C wherever the program is by then, unless it has left the block; never after 0 seconds."""
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def session_of(llm: LLM, system: str | None, options: dict[str, Any]) -> chat.Session:
    return chat.Session(llm, "", {}, options, False, Conversation(system))


def take_turn(session: chat.Session, fresh: LLM | None, chance: random.Random, counts: Counter[str]) -> None:
    """One message, perhaps after a command and perhaps interrupted. fresh: whose answer must be the same."""
    if chance.random() < 0.1:
        with contextlib.suppress(MinisaError):
            chat.command(session, chance.choice(COMMANDS))
    conversation, text = session.conversation, chance.choice(TEXTS)
    before, system = conversation.turns, conversation.system
    whole = True
    try:
        with interrupted_after(chance.choice((0, 10 ** chance.uniform(-3, -0.5)))):
            chat.answer(session, text)
    except KeyboardInterrupt:
        whole = False
    counts["whole answers" if whole else "interrupted"] += 1
    counts["turns dropped"] += conversation.forgotten
    if fresh is not None and conversation.turns is not before:  # something was said
        fresh.cache.tokens[0].clear()
        other = session_of(fresh, system, session.options)
        other.conversation.turns = before
        said, expected = conversation.turns[-1]["content"], "".join(chunk.text for chunk in other.send(text))
        assert said == expected if whole else expected.startswith(said), f"{said!r}, a fresh session says {expected!r}"
        counts["compared"] += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=1000)
    parser.add_argument("--every", type=int, default=10, help="Turns from one comparison to the next.")
    parser.add_argument("--model")
    parser.add_argument("--sa")
    parser.add_argument("--speculate", action="store_true")
    parser.add_argument("--compile", action="store_true", help="The C++ step in bf16 in place of eager fp32.")
    flags = parser.parse_args()
    chance, counts = random.Random(1), Counter[str]()
    with tempfile.TemporaryDirectory() as folder:
        shape = {"dim": 64, "n_heads": 4, "n_kv_heads": 2, "head_dim": 32, "hidden_dim": 96}
        model = flags.model or chat_model(Path(folder), **shape)
        how: dict[str, Any] = {"compile": flags.compile, "dtype": "bf16" if flags.compile else "fp32"}
        llm, fresh = (load(model, flags.sa, "cpu", max_seq_len=256, **how) for _ in range(2))
        print(llm.runner.name)
        options = {"max_new_tokens": 16, "repetition_penalty": 1.1, "speculate": flags.speculate}
        session = session_of(llm, None, options)
        for turn in range(flags.turns + 1):
            if turn % max(flags.turns // 10, 1) == 0:
                gc.collect()
                print(f"{turn:>5} turns  {resident('VmRSS') / 2**20:7.1f} MiB  {dict(counts)}", flush=True)
            SCREEN.seek(0)
            SCREEN.truncate()
            with contextlib.redirect_stdout(SCREEN), contextlib.redirect_stderr(SCREEN):
                take_turn(session, None if turn % flags.every else fresh, chance, counts)


if __name__ == "__main__":
    main()
