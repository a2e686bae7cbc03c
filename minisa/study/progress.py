"""Progress of long work on stderr, with the time left."""

from __future__ import annotations

import sys
import time

EVERY = 30.0  # seconds between lines where stderr is no terminal


class Progress:
    """A line on stderr: label, share done, time left. Rewritten in place on a terminal, else one every 30 seconds.

    total: units of work; choose units that take about the same time each. `with` takes the line away in the end.
    """

    def __init__(self, label: str, total: float) -> None:
        self._label = label
        self._total = total
        self._began = self._shown = time.monotonic()
        self._terminal = sys.stderr.isatty()

    def update(self, done: float, total: float | None = None) -> None:
        """`done` of the total units; total: where it is known better by now."""
        now = time.monotonic()
        self._total = total or self._total
        if done > 0 and now - self._shown >= (0.2 if self._terminal else EVERY):
            self._shown = now
            left = (now - self._began) / done * (self._total - done)
            text = f"{self._label}: {done / self._total:.0%}, {duration(left)} left"
            print(f"\r\x1b[K{text}" if self._terminal else f"{text}\n", end="", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Take the line off a terminal."""
        if self._terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def duration(seconds: float) -> str:
    """42 s, 3 min, 2.5 h."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5970 else f"{seconds / 3600:.1f} h"
