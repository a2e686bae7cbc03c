"""chat.py in processes of its own: a session on a terminal, interrupts, a reader that leaves."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.commands import FRANCE
from tests.loadable import N_TOKENS
from tests.tiny import random_weights, tiny_config, write_hf
from tests.vocabularies import byte_level_json, gpt2_letters, write_json

ROOT = Path(__file__).parents[1]


class Terminal:
    """chat.py on a pseudo-terminal."""

    def __init__(self, *flags: str) -> None:
        environment = {**os.environ, "TERM": "dumb", "HOME": "/nonexistent"}
        self._pid, self._fd = pty.fork()
        if self._pid == 0:
            os.chdir(ROOT)
            os.execve(sys.executable, [sys.executable, "chat.py", "--temperature", "0", *flags], environment)
        self.shown = ""

    def expect(self, pattern: str, seconds: float = 60) -> str:
        """Everything up to and including the pattern, which is then behind us."""
        deadline = time.monotonic() + seconds
        while (match := re.search(pattern, self.shown)) is None:
            assert time.monotonic() < deadline, f"no {pattern!r} in {self.shown!r}"
            if select.select([self._fd], [], [], 0.2)[0]:
                with contextlib.suppress(OSError):
                    self.shown += os.read(self._fd, 65536).decode("utf-8", "replace")
        seen, self.shown = self.shown[: match.end()], self.shown[match.end() :]
        return seen

    def type(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def leave(self) -> int:
        """Ctrl-D at the prompt; the exit status."""
        self.expect("> $")  # before the prompt the terminal itself would swallow it
        self.type("\x04")
        return self.wait()

    def interrupt(self, until: str) -> str:
        """Ctrl-C, until the pattern is shown; everything up to it.

        One alone may go unseen: between printing its prompt and waiting for a key, readline hears a signal only with
        the next key, or the next signal.
        """
        deadline = time.monotonic() + 60
        while True:
            os.kill(self._pid, signal.SIGINT)
            try:
                return self.expect(until, seconds=2)
            except AssertionError:
                if time.monotonic() > deadline:
                    raise

    def wait(self, seconds: float = 60) -> int:
        deadline = time.monotonic() + seconds
        while not (ended := os.waitpid(self._pid, os.WNOHANG))[0]:
            assert time.monotonic() < deadline, f"still running; showed {self.shown!r}"
            with contextlib.suppress(OSError):
                if select.select([self._fd], [], [], 0.1)[0]:
                    self.shown += os.read(self._fd, 65536).decode("utf-8", "replace")
        self._pid = 0
        return os.waitstatus_to_exitcode(ended[1])

    def close(self) -> None:
        if self._pid:
            os.kill(self._pid, signal.SIGKILL)
            self.wait()
        os.close(self._fd)


@pytest.fixture
def terminal(smollm2_path: Path) -> Iterator[Callable[..., Terminal]]:
    with contextlib.ExitStack() as stack:

        def start(*flags: str) -> Terminal:
            opened = Terminal(*flags)
            stack.callback(opened.close)
            return opened

        yield start


@pytest.mark.real_model
def test_an_interactive_session(terminal: Callable[..., Terminal]) -> None:
    """Several turns, every command, an answer interrupted and the session kept, bad input survived, Ctrl-D."""
    session = terminal("--max-seq-len", "512", "--max-new-tokens", "100")
    session.expect(r"plain attention .* context 512")
    session.expect("> ")
    session.type(f"{FRANCE}\n")
    assert "Paris" in session.expect(r"context \d+/512.*\]")
    session.type("/stats\n")
    assert "prompt   37 tokens, 0 of them in the cache already" in session.expect("allocated")
    session.type("And what river flows through it?\n")
    session.expect(r"context \d+/512.*\]")
    session.type("/stats\n")
    reused = re.search(r"prompt   (\d+) tokens, (\d+) of them", session.expect("allocated"))
    assert reused is not None
    assert int(reused[1]) - int(reused[2]) < 25  # only the new turn was computed
    session.type("Tell me a very long story about a ship.\n")
    session.expect("ship.*\\n")
    time.sleep(0.2)
    session.interrupt(until=r"\(stopped\)")
    session.type("/stats\n")
    session.expect(r"no answer yet, or the last one was stopped")
    session.type("/help\n")
    session.expect("Ctrl-D leaves")
    session.type("/nonsense\n")
    session.expect(r"\(/nonsense is not a command; /help lists them\)")
    session.type("/sa 0-1\n")
    session.expect(r"\(plan: layer 0 cannot follow.*\)")
    session.type("/sa default\n")
    session.expect(r"4 follow \(3:6,19:21,25:27,28:29\)")
    session.type("/sa\n")
    session.expect("layer 19 leads 21")
    session.type("/system You are a pirate.\n")
    session.type(f"{FRANCE}\n")
    session.expect(r"context \d+/512.*\]")
    session.type("x" * 3000 + "\n")
    session.expect(r"\(the prompt is \d+ tokens long, the context 512")
    session.type("/reset\n")
    session.type(f"{FRANCE}\n")
    session.expect(r"context \d+/512.*\]")
    assert session.leave() == 0


@pytest.mark.real_model
def test_interrupt_at_the_prompt_keeps_the_session(terminal: Callable[..., Terminal]) -> None:
    session = terminal("--max-seq-len", "128")
    session.expect("> ")
    session.interrupt(until="> $")
    session.type("/help\n")
    session.expect("Ctrl-D leaves")
    assert session.leave() == 0


def test_an_answer_cannot_command_the_terminal(tmp_path: Path) -> None:
    """A model that says nothing but the escape character; into a pipe it goes as it is."""
    config = tiny_config(vocab_size=N_TOKENS, tie_embeddings=False)
    weights = random_weights(config)
    weights["output.weight"].zero_()  # all tokens are equally likely, and the first is chosen
    write_hf(tmp_path, config, weights)
    letters = gpt2_letters()
    vocabulary = byte_level_json()
    vocabulary["model"]["vocab"] |= {letters[0x1B]: 0, letters[0]: 0x1B}
    write_json(tmp_path / "tokenizer.json", vocabulary)
    flags = ["--model", str(tmp_path), "--raw", "--prompt", "hello", "--max-new-tokens", "3"]
    with contextlib.closing(Terminal(*flags)) as session:
        assert "\ufffd\ufffd\ufffd\r\n" in session.expect(r"context \d+/")
        assert session.wait() == 0
    piped = subprocess.run([sys.executable, "chat.py", *flags], cwd=ROOT, stdout=subprocess.PIPE, check=True)
    assert piped.stdout == b"\x1b\x1b\x1b\n"


def start(smollm2_path: Path, *flags: str, **options: Any) -> subprocess.Popen[bytes]:
    command = [sys.executable, "chat.py", "--max-seq-len", "2048", "--temperature", "0", *flags]
    return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, **options)


@pytest.mark.real_model
def test_a_reader_that_leaves_early(smollm2_path: Path) -> None:
    """`chat.py --prompt … | head -c 1`: no traceback, and it ends."""
    process = start(smollm2_path, "--prompt", "Count to 500.", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(1)
    process.stdout.close()
    errors = process.stderr.read().decode()
    assert process.wait(timeout=60) == 1
    assert "Traceback" not in errors
    assert "BrokenPipe" not in errors


@pytest.mark.real_model
def test_interrupting_a_single_answer_ends_with_130(smollm2_path: Path) -> None:
    process = start(smollm2_path, "--prompt", "Count to 500.", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in errors
