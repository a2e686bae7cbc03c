"""Fuzz a reader of files, by hand: `python -m tests.fuzz READER --seconds 200`.

Each input is a sound file changed by tests/changes.py, which knows the formats. Whatever is not read must end in a
MinisaError of one line that names the file, within SLOW seconds of a processor and LARGE bytes of memory. What does
not is written to --out; the counts of outcomes are printed at the end.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import json
import random
import resource
import sys
import tempfile
import time
import traceback
from pathlib import Path

from minisa.errors import MinisaError
from tests.changes import changed
from tests.fuzz_readers import READERS, Reader

SLOW, LARGE = 5.0, 1 << 30


def outcome(reader: Reader, content: bytes) -> str:
    """What becomes of an input: "read", "refused", or what is wrong."""
    reader.file.write_bytes(content)
    began, memory = time.process_time(), _peak_memory()
    found = "read"
    try:
        reader.read()
    except KeyboardInterrupt:
        raise
    except MinisaError as error:
        named = str(reader.named) in str(error) and len(str(error).splitlines()) == 1
        found = "refused" if named else f"BAD MESSAGE {str(error)[:200]!r}"
    except BaseException as error:  # a panic of tiktoken's is not an Exception
        line = traceback.extract_tb(error.__traceback__)[-1]
        found = f"{type(error).__name__} in {Path(line.filename).name}:{line.lineno}: {str(error)[:100]}"
    if (took := time.process_time() - began) > SLOW:
        found = f"SLOW {took:.0f} s, {found}"
    if (grown := _peak_memory() - memory) > LARGE:
        found = f"LARGE {grown >> 20} MiB, {found}"
    return found


def _peak_memory() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reader", choices=READERS)
    parser.add_argument("--seconds", type=float, default=60, help="Of a processor.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("findings"), help="Folder for inputs that break the promise.")
    flags = parser.parse_args()
    outcomes: collections.Counter[str] = collections.Counter()
    chance, until = random.Random(flags.seed), time.process_time() + flags.seconds
    with tempfile.TemporaryDirectory() as folder:
        reader = READERS[flags.reader](Path(folder))
        assert outcome(reader, reader.seed) == "read"
        while time.process_time() < until:
            content = changed(reader.seed, chance)
            outcomes[found := outcome(reader, content)] += 1
            if found not in ("read", "refused") and outcomes[found] == 1:
                flags.out.mkdir(parents=True, exist_ok=True)
                (flags.out / f"finding-{hashlib.sha256(content).hexdigest()[:12]}").write_bytes(content)
    print(json.dumps({"runs": outcomes.total(), "outcomes": dict(outcomes.most_common())}))
    sys.exit(not outcomes.keys() <= {"read", "refused"})


if __name__ == "__main__":
    main()
