"""Worker: an object that lives in a process of its own and is called from here."""

from __future__ import annotations

import multiprocessing
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from typing import Any

from minisa.device import is_out_of_memory
from minisa.errors import MinisaError
from minisa.interrupts import uninterrupted

# Forks of a small process that has imported torch once and done nothing else: quick to start, and nobody's pages.
# Apple's libraries do not survive a fork, so there each imports torch itself.
_METHOD = "spawn" if sys.platform == "darwin" else "forkserver"
_CONTEXT: Any = multiprocessing.get_context(_METHOD)
PATIENCE = 2.0  # seconds for a worker to tidy up after itself
_PRELOAD = ["minisa.benchmark.contender"]


class Worker:
    """Runs factory(*arguments) in a new process; `call` runs methods of what it returns, one at a time.

    What is sent must be picklable. MinisaError, and running out of memory, come back as MinisaError with `name` in
    front, any other exception as RuntimeError with its traceback. Ctrl-C is the caller's business, not the worker's.
    """

    def __init__(self, name: str, factory: Callable[..., Any], *arguments: Any) -> None:
        self.name = name
        self._pipe, theirs = _CONTEXT.Pipe()
        self._process = _CONTEXT.Process(target=_serve, args=(theirs, factory, arguments), daemon=True)
        if _METHOD == "forkserver":
            _CONTEXT.set_forkserver_preload(_PRELOAD)
            with _interrupts_ignored():
                forkserver.ensure_running()
            with uninterrupted():  # for as long as the server imports torch
                self._process.start()
        else:
            with _interrupts_ignored():
                self._process.start()
        theirs.close()
        try:
            self._receive()
        except BaseException:
            self.close()
            raise

    def call(self, method: str, *arguments: Any) -> Any:
        self._pipe.send((method, arguments))
        return self._receive()

    def close(self) -> None:
        """End the process: at once if it waits for a call, by force if it is busy."""
        self._pipe.close()
        self._process.join(PATIENCE)
        self._process.terminate()
        self._process.join()

    def _receive(self) -> Any:
        try:
            kind, value = self._pipe.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            raise MinisaError(
                f"{self.name}: its process ended with status {self._process.exitcode}; "
                "-9 means that the machine ran out of memory: take a smaller model or smaller --contexts"
            ) from None
        if kind == "refused":
            raise MinisaError(f"{self.name}: {value}")
        if kind == "failed":
            raise RuntimeError(f"in the process of {self.name}:\n{value}")
        return value


def _serve(pipe: Connection, factory: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    served: Any = None
    method = None
    while True:
        try:
            if method is None:
                served, value = factory(*arguments), None
            else:
                value = getattr(served, method)(*arguments)
            answer: tuple[str, Any] = ("done", value)
        except MinisaError as error:
            answer = ("refused", str(error))
        except Exception as error:
            answer = ("failed", traceback.format_exc())
            if is_out_of_memory(error):
                answer = ("refused", "out of memory: take a smaller model, smaller --contexts or another --device")
        try:
            pipe.send(answer)
            method, arguments = pipe.recv()
        except (EOFError, ConnectionError):  # the caller has left
            return


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """What is started meanwhile never hears of Ctrl-C."""
    try:
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    except ValueError:  # not in the main thread, where nobody gets the signal anyway
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
