"""Fuzz a reader of files, by hand: `python -m tests.fuzz READER --seconds 200`.

Each input is a sound file changed by tests/changes.py, which knows the formats, and by atheris where it is installed
(`pip install atheris`), which keeps what reaches code that no input has reached before. Whatever is not read must end
in a MinisaError of one line that names the file, within SLOW seconds of a processor and LARGE bytes of memory. What
does not is written to --out; the counts of outcomes are printed at the end.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import hashlib
import importlib
import itertools
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


def outcome(reader: Any, content: bytes) -> str:
    """What becomes of an input: "read", "refused", or what is wrong."""
    reader.file.write_bytes(content)
    began, memory = time.process_time(), _peak_memory()
    found = "read"
    try:
        reader.read()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # tiktoken panics by what is no Exception
        line = traceback.extract_tb(error.__traceback__)[-1]
        found = f"{type(error).__name__} in {Path(line.filename).name}:{line.lineno}: {str(error)[:100]}"
        if type(error).__name__ == "MinisaError":
            named = str(reader.named) in str(error) and len(str(error).splitlines()) == 1
            found = "refused" if named else f"BAD MESSAGE {str(error)[:200]!r}"
    if (took := time.process_time() - began) > SLOW:
        found = f"SLOW {took:.0f} s, {found}"
    if (grown := _peak_memory() - memory) > LARGE:
        found = f"LARGE {grown >> 20} MiB, {found}"
    return found


def _peak_memory() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reader", help="Which; a wrong one lists them.")
    parser.add_argument("--seconds", type=float, default=60, help="Of a processor.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--blind", action="store_true", help="Do without atheris.")
    parser.add_argument("--out", type=Path, default=Path("findings"), help="Folder for inputs that break the promise.")
    flags = parser.parse_args()
    atheris = None
    if not flags.blind:
        with contextlib.suppress(ImportError):
            atheris = importlib.import_module("atheris")
    with atheris.instrument_imports(include=["minisa"]) if atheris else contextlib.nullcontext():
        changed = importlib.import_module("tests.changes").changed  # what is imported earlier is not seen by atheris
        readers = importlib.import_module("tests.fuzz_readers").READERS
    if flags.reader not in readers:
        parser.error(f"no reader {flags.reader!r}: expected one of {', '.join(readers)}")
    outcomes: collections.Counter[str] = collections.Counter()
    until = time.process_time() + flags.seconds
    with tempfile.TemporaryDirectory() as folder:
        reader = readers[flags.reader](Path(folder))
        assert outcome(reader, reader.seed) == "read"

        def run(content: bytes) -> None:
            found = outcome(reader, content)
            outcomes[found] += 1
            if found not in ("read", "refused") and outcomes[found] == 1:
                flags.out.mkdir(parents=True, exist_ok=True)
                (flags.out / f"finding-{hashlib.sha256(content).hexdigest()[:12]}").write_bytes(content)
            if time.process_time() > until:
                print(json.dumps({"runs": outcomes.total(), "outcomes": dict(outcomes.most_common())}), flush=True)
                os._exit(int(not outcomes.keys() <= {"read", "refused"}))  # atheris cannot be stopped from inside

        def mutated(content: bytes, longest: int, seed: int) -> bytes:
            chance = random.Random(seed)
            return atheris.Mutate(content, longest) if chance.random() < 0.2 else changed(content, chance)[:longest]

        if atheris is None:
            chance = random.Random(flags.seed)
            for _ in itertools.count():
                run(changed(reader.seed, chance))
        corpus = Path(folder) / "corpus"
        corpus.mkdir()
        (corpus / "seed").write_bytes(reader.seed)
        options = [f"-max_len={2 * len(reader.seed)}", f"-seed={flags.seed + 1}", "-verbosity=0"]
        atheris.Setup([sys.argv[0], *options, str(corpus)], run, custom_mutator=mutated)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
