"""Fuzz a reader of files, by hand: `python -m tests.fuzz READER --seconds 200`.

Each input is a sound file changed by atheris, which keeps what reaches code that no input has reached before
(`pip install atheris`), and by `changed` below, which knows JSON and the words that minisa looks for; without atheris,
or with --blind, by that alone. Whatever is not read must end in a MinisaError of one line that names the file, within
SLOW seconds and LARGE bytes of memory. What does not is written to --out, and the counts of outcomes are printed at the
end.
"""

from __future__ import annotations

import argparse
import ast
import collections
import contextlib
import functools
import hashlib
import importlib
import json
import math
import os
import random
import re
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
        self.until = time.monotonic() + seconds
        self.out = out
        self.outcomes: collections.Counter[str] = collections.Counter()
        self.runs = 0

    def run(self, content: bytes) -> None:
        reader = self.reader
        (reader.rewrite or reader.file.write_bytes)(content)
        self.runs += 1
        began, memory = time.monotonic(), _peak_memory()
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
        if time.monotonic() - began > SLOW:
            outcome = f"SLOW {time.monotonic() - began:.0f} s, {outcome}"
        if _peak_memory() - memory > LARGE:
            outcome = f"LARGE {(_peak_memory() - memory) >> 20} MiB, {outcome}"
        if outcome not in ("read", "refused") and outcome not in self.outcomes:
            (self.out / f"finding-{hashlib.sha256(content).hexdigest()[:12]}").write_bytes(content)
        self.outcomes[outcome] += 1
        if time.monotonic() > self.until:
            self.report()

    def report(self) -> None:
        """Print the counts and leave at once: atheris cannot be stopped from inside."""
        print(json.dumps({"runs": self.runs, "outcomes": dict(self.outcomes.most_common())}), flush=True)
        os._exit(int(any(outcome not in ("read", "refused") for outcome in self.outcomes)))


def _peak_memory() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def changed(content: bytes, chance: random.Random) -> bytes:
    """One to four changes: of what is JSON mostly by its values, its syntax kept; of bytes, numbers and pieces else."""
    times = chance.randint(1, 4)
    if chance.random() < 0.8 and (found := json_in(content)):
        begin, end, tree = found
        for _ in range(times):
            change_tree(tree, chance)
        text = json.dumps(tree, ensure_ascii=chance.random() < 0.5).encode(errors="surrogatepass")
        return (len(text).to_bytes(begin, "little") if begin else b"") + text + content[end:]
    return changed_bytes(content, chance, times)


def json_in(content: bytes) -> tuple[int, int, Any] | None:
    """The JSON that a file is or, as safetensors, begins with after its length: begin, end and value."""
    begin = 8 if content[8:9] == b"{" else 0
    end = begin + int.from_bytes(content[:begin], "little") if begin else len(content)
    with contextlib.suppress(ValueError, RecursionError):
        return begin, end, json.loads(content[begin:end])
    return None


def change_tree(tree: Any, chance: random.Random) -> None:
    """A value of a JSON tree is replaced, removed, taken from elsewhere or put under a word that minisa looks for."""
    places: list[tuple[Any, Any]] = []
    inner = [tree]
    for node in inner:
        keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
        places += [(node, key) for key in keys]
        inner += [node[key] for key in keys]
    if not places:
        return
    node, key = chance.choice(places)
    match chance.randrange(4):
        case 0:
            node[key] = odd_value(chance)
        case 1:
            del node[key]
        case 2:
            there, place = chance.choice(places)
            node[key] = json.loads(json.dumps(there[place]))
        case 3 if isinstance(node, dict):
            node[chance.choice(words())] = odd_value(chance)
        case 3:
            node.insert(key, odd_value(chance))


def odd_value(chance: random.Random) -> object:
    odd: list[object] = [None, True, False, -1, 0, 1, 2, 3, 0.5, 1e308, math.nan, 2**31, 10**30, "", "\ud800", [], {}]
    match chance.randrange(4):
        case 0:
            return chance.choice(words())
        case 1:
            return [chance.choice(odd) for _ in range(chance.randint(1, 4))]
        case 2:
            return {chance.choice(words()): chance.choice((*odd, *words())) for _ in range(chance.randint(1, 4))}
    return chance.choice(odd)


@functools.cache
def words() -> list[str]:
    """The strings in minisa's source that may be a key or a value of a file."""
    found = set()
    for file in (Path(__file__).parents[1] / "minisa").rglob("*.py"):
        nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        found |= {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return sorted(word for word in found if re.fullmatch(r"[\w.<>|/-]{2,40}", word))


def changed_bytes(seed: bytes, chance: random.Random, times: int) -> bytes:
    """Bytes flipped, numbers made huge, pieces cut out, doubled or cut off, words put in."""
    content = bytearray(seed)
    for _ in range(times):
        place = int(len(content) * chance.random() ** chance.choice((1, 3)))  # more often near the beginning
        match chance.randrange(7):
            case 0:
                content[place : place + 1] = bytes([chance.randrange(256)])
            case 1:
                content[place : place + 8] = chance.choice((b"\xff" * 8, bytes(8), b"\0" * 7 + b"\x7f"))
            case 2:
                del content[place : place + chance.randint(1, 64)]
            case 3:
                content[place:place] = content[place : place + chance.randint(1, 64)]
            case 4:
                del content[place:]
            case 5:
                numbers = list(re.finditer(rb"\d+", bytes(content[:20_000])))
                if numbers:
                    begin, end = chance.choice(numbers).span()
                    content[begin:end] = chance.choice((b"-1", b"1e999", b"NaN", b"null", b"[]", b"9" * 400, b'"x"'))
            case 6:
                word = chance.choice(words()).encode()
                content[place : place + len(word)] = word
    return bytes(content)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reader", help="Which; a wrong one lists them.")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--blind", action="store_true", help="Do without atheris.")
    parser.add_argument("--out", type=Path, default=Path("findings"), help="Folder for inputs that break the promise.")
    flags = parser.parse_args()
    try:
        atheris = None if flags.blind else importlib.import_module("atheris")
    except ImportError:
        atheris = None
    with atheris.instrument_imports(include=["minisa"]) if atheris else contextlib.nullcontext():
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
                fuzz.run(changed(reader.seed, chance))

        structured = json_in(reader.seed) is not None

        def mutated(content: bytes, longest: int, seed: int) -> bytes:
            chance = random.Random(seed)
            if structured and json_in(content) is None and chance.random() < 0.5:
                content = reader.seed  # what is no JSON any more teaches little
            if chance.random() < (0.1 if structured else 0.5):
                return atheris.Mutate(content, longest)
            return changed(content, chance)[:longest]

        corpus = Path(folder) / "corpus"
        corpus.mkdir()
        (corpus / "seed").write_bytes(reader.seed)
        longest = f"-max_len={2 * len(reader.seed)}"
        arguments = [sys.argv[0], longest, f"-seed={flags.seed + 1}", "-verbosity=0", str(corpus)]
        atheris.Setup(arguments, fuzz.run, custom_mutator=mutated)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
