"""Fuzz a reader of files, by hand: `python -m tests.fuzz READER --seconds 200`.

Each input is a sound file changed by atheris, which keeps what reaches code that no input has reached before
(`pip install atheris`), and by tests/changes.py, which knows the formats; without atheris, or with --blind, by that
alone. Whatever is not read must end in a MinisaError of one line that names the file, within SLOW seconds of a
processor and LARGE bytes of memory. What does not is written to --out, and the counts of outcomes are printed at the
end.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import hashlib
import importlib
import json
import os
import random
import resource
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

SLOW, LARGE = 5.0, 1 << 30


class Fuzz:
    """Runs inputs and counts what became of them."""

    def __init__(self, reader: Any, seconds: float, out: Path) -> None:
        self.reader = reader
        self.until = time.process_time() + seconds
        self.out = out
        self.outcomes: collections.Counter[str] = collections.Counter()
        self.runs = 0

    def run(self, content: bytes) -> None:
        reader = self.reader
        (reader.rewrite or reader.file.write_bytes)(content)
        self.runs += 1
        began, memory = time.process_time(), _peak_memory()
        outcome = "read"
        try:
            reader.read()
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # tiktoken panics by what is no Exception
            line = traceback.extract_tb(error.__traceback__)[-1]
            outcome = f"{type(error).__name__} in {Path(line.filename).name}:{line.lineno}: {str(error)[:100]}"
            if type(error).__name__ == "MinisaError":
                named = str(reader.named) in str(error) and len(str(error).splitlines()) == 1
                outcome = "refused" if named else f"BAD MESSAGE {str(error)[:200]!r}"
        if (took := time.process_time() - began) > SLOW:
            outcome = f"SLOW {took:.0f} s, {outcome}"
        if _peak_memory() - memory > LARGE:
            outcome = f"LARGE {(_peak_memory() - memory) >> 20} MiB, {outcome}"
        if outcome not in ("read", "refused") and outcome not in self.outcomes:
            (self.out / f"finding-{hashlib.sha256(content).hexdigest()[:12]}").write_bytes(content)
        self.outcomes[outcome] += 1
        if time.process_time() > self.until:
            self.report()

    def report(self) -> None:
        """Print the counts and leave at once: atheris cannot be stopped from inside."""
        print(json.dumps({"runs": self.runs, "outcomes": dict(self.outcomes.most_common())}), flush=True)
        os._exit(int(any(outcome not in ("read", "refused") for outcome in self.outcomes)))


def _peak_memory() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reader", help="Which; a wrong one lists them.")
    parser.add_argument("--seconds", type=float, default=60, help="Of a processor.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--blind", action="store_true", help="Do without atheris.")
    parser.add_argument("--out", type=Path, default=Path("findings"), help="Folder for inputs that break the promise.")
    parser.add_argument("--corpus", type=Path, help="Folder of what atheris keeps, to go on from; else thrown away.")
    flags = parser.parse_args()
    try:
        atheris = None if flags.blind else importlib.import_module("atheris")
    except ImportError:
        atheris = None
    with atheris.instrument_imports(include=["minisa"]) if atheris else contextlib.nullcontext():
        changes = importlib.import_module("tests.changes")  # what is imported earlier is not seen by atheris
        readers = importlib.import_module("tests.fuzz_readers").READERS
    if flags.reader not in readers:
        parser.error(f"no reader {flags.reader!r}: expected one of {', '.join(readers)}")
    flags.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        reader = readers[flags.reader](Path(folder))
        fuzz = Fuzz(reader, flags.seconds, flags.out)
        fuzz.run(reader.seed)
        assert fuzz.outcomes == {"read": 1}, fuzz.outcomes  # or nothing said below means anything
        if atheris is None:
            chance = random.Random(flags.seed)
            while True:
                fuzz.run(changes.changed(reader.seed, chance))

        structured = changes.parse(reader.seed) is not None

        def mutated(content: bytes, longest: int, seed: int) -> bytes:
            chance = random.Random(seed)
            if structured and changes.parse(content) is None and chance.random() < 0.5:
                content = reader.seed  # what has lost its syntax teaches little
            if chance.random() < (0.1 if structured else 0.5):
                return atheris.Mutate(content, longest)
            return changes.changed(content, chance)[:longest]

        corpus = flags.corpus or Path(folder) / "corpus"
        corpus.mkdir(parents=True, exist_ok=True)
        (corpus / "seed").write_bytes(reader.seed)
        longest = f"-max_len={2 * len(reader.seed)}"
        arguments = [sys.argv[0], longest, f"-seed={flags.seed + 1}", "-verbosity=0", str(corpus)]
        atheris.Setup(arguments, fuzz.run, custom_mutator=mutated)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
