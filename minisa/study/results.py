"""Results item by item in a file of JSON lines, so that an evaluation goes on where it was interrupted.

{"settings": {"task": "piqa", "model": …, "data_sha256": …, …}}
{"variant": "plain", "identity": "none"}
{"variant": "plain", "item": 12, "scores": {"acc": [1.0, 1.0], …}, …}
"""

from __future__ import annotations

import errno
import fcntl
import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from minisa.errors import MinisaError
from minisa.files import read_text

Record = dict[str, Any]
LARGEST = 1e15  # that a score can be: its sums and squares are numbers still


class Results:
    """Records by variant and item. With a path, everything added is in the file at once.

    settings: what all records of a file have in common. metrics: the scores that each has. Raises MinisaError for a
    file of other settings, naming the first that differs, for one that is no such file, and for one that is open yet.
    """

    def __init__(self, path: Path | None, settings: Record, metrics: Sequence[str] = ()) -> None:
        self._path = path
        self._metrics = metrics
        self._identities: dict[str, str] = {}
        self._records: dict[str, dict[int, Record]] = {}
        self._file: IO[str] | None = None
        if path is not None:
            try:
                self._take_up(path, settings)
            except BaseException:
                self.close()
                raise

    def variant(self, name: str, identity: str) -> dict[int, Record]:
        """What is known of a variant, by item. identity: what the name stands for, e.g. a plan file's sha256.

        Raises MinisaError where the name stood for something else.
        """
        if name not in self._identities:
            self._identities[name] = identity
            self._write({"variant": name, "identity": identity})
        elif self._identities[name] != identity:
            raise MinisaError(f"{self._path}: {name} has changed since: delete the file or take another --json")
        return self._records.setdefault(name, {})

    def add(self, variant: str, item: int, record: Record) -> None:
        self._records[variant][item] = record
        self._write({"variant": variant, "item": item, **record})

    def close(self) -> None:
        if self._file is not None:
            with suppress(OSError):  # of a line that _write has said it cannot write
                self._file.close()

    def _take_up(self, path: Path, settings: Record) -> None:
        try:
            if path.exists() and not path.is_file():  # a pipe would be waited for
                raise OSError(errno.EINVAL, "not a file")
            self._file = path.open("a", encoding="utf-8")
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until it is closed
            *whole, rest = read_text(path).split("\n")  # the rest is empty, or a line that was cut
            if not whole and not json.dumps({"settings": settings}).startswith(rest):
                raise self._foreign(1)
            for number, line in enumerate(whole, 1):
                self._read(line, number, settings)
            if rest:
                self._file.truncate(self._file.tell() - len(rest.encode()))
        except BlockingIOError as error:
            raise MinisaError(f"{path}: another eval is at work on it: wait, or take another --json") from error
        except OSError as error:
            raise MinisaError(f"{path}: cannot keep results there: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise self._foreign(1) from error
        if not whole:
            self._write({"settings": settings})

    def _write(self, line: Record) -> None:
        if self._file is not None:
            try:
                self._file.write(json.dumps(line) + "\n")
                self._file.flush()
            except OSError as error:
                raise MinisaError(f"{self._path}: cannot keep results there: {error.strerror}") from error

    def _read(self, line: str, number: int, settings: Record) -> None:
        try:
            record = json.loads(line)
            if number == 1:
                self._check(record["settings"], settings)
            elif "identity" in record:
                self._identities[record["variant"]] = record["identity"]
            else:
                name, item, scores = record.pop("variant"), record.pop("item"), record["scores"]
                complete = scores.keys() >= set(self._metrics) and all(map(_is_score, scores.values()))
                if type(item) is not int or item < 0 or not complete:
                    raise ValueError("not the record of an item")
                self._records.setdefault(name, {})[item] = record
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise self._foreign(number) from error

    def _check(self, found: Record, settings: Record) -> None:
        for key, value in settings.items():
            if found.get(key) != value:
                raise MinisaError(
                    f"{self._path} was made with {key} {found.get(key)!r}, now it is {value!r}: "
                    "delete the file or take another --json"
                )

    def _foreign(self, number: int) -> MinisaError:
        return MinisaError(f"{self._path}, line {number}: not results of eval: delete the file or take another --json")


def _is_score(pair: Any) -> bool:
    """A numerator and a denominator; NaN is what a model leaves whose numbers overflow."""
    return (
        isinstance(pair, list)
        and len(pair) == 2
        and all(type(number) in (int, float) and not abs(number) > LARGEST for number in pair)
    )
