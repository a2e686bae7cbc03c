"""Ctrl-C before a command line can hear it; Ctrl-C and being told to end, put off until what is at work can stop."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager


def end_without_traceback() -> None:
    """Let Ctrl-C end the process at once, as it does a program in C, until `raise_interrupts`.

    A command line calls it before it imports PyTorch, which takes seconds.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a shell's background jobs are deaf to it
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def raise_interrupts() -> None:
    """Let Ctrl-C raise KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C, and being told to end, wait for the end of what is done inside: none of it is left half done."""
    caught: list[int] = []
    try:
        before = {
            waiting: signal.signal(waiting, lambda number, _: caught.append(number))
            for waiting in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
            if signal.getsignal(waiting) is not None  # one that is not Python's could not be put back
        }
    except ValueError:  # not in the main thread, where nobody gets a signal anyway
        yield
        return
    try:
        yield
    finally:
        for waiting, handler in reversed(before.items()):  # an interrupt in between would leave the others
            signal.signal(waiting, handler)
        for number in caught:
            signal.raise_signal(number)
