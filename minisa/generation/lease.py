"""Leases: one model, whichever threads use it: a step at a time, of the generation begun last."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from threading import RLock

from minisa.errors import MinisaError

Lease = Callable[[], AbstractContextManager[None]]


class Leases:
    """Who may use a model and its cache.

    alone: held while anything is computed. A process is forked between two steps, so a child finds it open.
    """

    def __init__(self) -> None:
        self.alone = RLock()
        self._latest: object = None  # the generation whose the cache is; None once one was broken off
        if hasattr(os, "register_at_fork"):
            acquire, release = self.alone.acquire, self.alone.release
            os.register_at_fork(before=acquire, after_in_parent=release, after_in_child=release)

    def begin(self) -> Lease:
        """A new generation takes the cache; it does a step, or changes its rows, inside of `with lease():`.

        That raises MinisaError once another has begun, and after a step that was broken off half way: what has been
        computed and what has been given out no longer agree then.
        """
        mine = self._latest = object()

        @contextmanager
        def lease() -> Iterator[None]:
            with self.alone:
                if self._latest is not mine:
                    if self._latest is None:
                        raise MinisaError("generate: interrupted in the middle of a step: begin anew")
                    raise MinisaError("generate: another generation has begun on this model; its cache is taken")
                try:
                    yield
                except MinisaError:
                    raise
                except BaseException:
                    if self._latest is mine:  # an old lease may be thrown away late
                        self._latest = None
                    raise

        return lease
