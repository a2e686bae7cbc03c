"""Worker: an object that lives in a process of its own and is called from here."""

from __future__ import annotations

import multiprocessing
import signal
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from minisa.device import is_out_of_memory
from minisa.errors import MinisaError

# Forks of a small process: what this one holds would count as a worker's peak memory.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload([])
PATIENCE = 2.0  # seconds for a worker to end by itself


class Worker:
    """Runs factory(*arguments) in a new process; `call` runs methods of what it returns, one at a time.

    MinisaError and running out of memory come back as MinisaError with `name` in front, any other exception as
    RuntimeError with its traceback. Only the caller hears Ctrl-C.
    """

    def __init__(self, name: str, factory: Callable[..., Any], *arguments: Any) -> None:
        self.name = name
        self._pipe, theirs = _CONTEXT.Pipe()
        self._process = _CONTEXT.Process(target=_serve, args=(theirs, factory, arguments), daemon=True)
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # which the new processes inherit
        try:
            self._process.start()
        finally:
            signal.signal(signal.SIGINT, handler)
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
        """End the process, by force if it is busy."""
        self._pipe.close()
        self._process.join(PATIENCE)
        self._process.terminate()
        self._process.join()

    def _receive(self) -> Any:
        try:
            error, value = self._pipe.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            raise MinisaError(
                f"{self.name}: its process ended with status {self._process.exitcode} (-9: out of memory); "
                "take a smaller model or smaller --contexts"
            ) from None
        if error is not None:
            raise error(f"{self.name}: {value}")
        return value


def _serve(pipe: Connection, factory: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    served: Any = None
    call = factory
    while True:
        error: type[Exception] | None = None
        value: Any
        try:
            value = call(*arguments)
            if served is None:
                served, value = value, None
        except MinisaError as refusal:
            error, value = MinisaError, str(refusal)
        except Exception as failure:
            error, value = RuntimeError, traceback.format_exc()
            if is_out_of_memory(failure):
                error, value = MinisaError, "out of memory: take smaller --contexts or another --device"
        try:
            pipe.send((error, value))
            method, arguments = pipe.recv()
        except (EOFError, ConnectionError):  # the caller has left
            return
        call = getattr(served, method)
