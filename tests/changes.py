"""Changes to a sound file: to the values in it, its syntax kept, where it is JSON or GGUF; and to its bytes.

What is cut or flipped blindly ends in the first check of a parser. What lies behind it sees files like these.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import random
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minisa.checkpoint import read_gguf
from tests.encode import encode_gguf

Parsed = tuple[Any, Callable[[Any], bytes]]  # a tree of lists and dictionaries, and what makes a file of such a tree
ODD = (None, True, False, -1, 0, 1, 2, 3, 0.5, 1e308, math.nan, 2**31, 10**30, "", "\ud800", [], {})
WORDS = (  # keys and values of the formats
    "F32", "BF16", "data_offsets", "dtype", "shape", "weight_map", "model.norm.weight", "norm.weight", "rope_scaling",
    "rope_type", "yarn", "linear", "factor", "head_dim", "sliding_window", "layer_types", "moe", "use_scaled_rope",
    "general.alignment", "split.count", "llama.rope.scaling.type", "rope_freqs.weight", "tokenizer.ggml.model",
    "tokenizer.ggml.scores", "tokenizer.ggml.pre", "chat_template", "added_tokens", "normalizer", "pre_tokenizer",
    "ByteLevel", "Metaspace", "Sequence", "merges", "vocab", "special", "content", "bos_token", "<s>", "<unk>",
    "pattern", "followers", "leader", "heads", "delta", "n_layers",
)  # fmt: skip


def changed(content: bytes, chance: random.Random) -> bytes:
    """One to four changes: mostly to the values in it, where its format is known; to its bytes else."""
    times = chance.randint(1, 4)
    if chance.random() < 0.8 and (parsed := parse(content)):
        tree, encode = parsed
        for _ in range(times):
            change_tree(tree, chance)
        with contextlib.suppress(struct.error, ArithmeticError, ValueError, TypeError, AttributeError, LookupError):
            return encode(tree)  # not every value has a place in a file
    return changed_bytes(content, chance, times)


def parse(content: bytes) -> Parsed | None:
    """The values in a file of a format known here; None for another, and for what has lost its syntax."""
    try:
        return (_gguf if content.startswith(b"GGUF") else _json)(content)
    except Exception:  # whatever a format's own library stumbles over
        return None


def _json(content: bytes) -> Parsed:
    """JSON, or what begins with it behind its length, as safetensors."""
    begin = 8 if content[8:9] == b"{" else 0
    end = begin + int.from_bytes(content[:begin], "little") if begin else len(content)

    def encode(tree: Any) -> bytes:
        text = json.dumps(tree, ensure_ascii=False).encode(errors="surrogatepass")
        return (len(text).to_bytes(begin, "little") if begin else b"") + text + content[end:]

    return json.loads(content[begin:end]), encode


def _gguf(content: bytes) -> Parsed:
    """Metadata, and type, shape and data of each tensor."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        header = read_gguf(Path(file.name))
    tensors = {
        info.name: [info.type.code, list(info.shape), content[info.offset : info.offset + info.nbytes]]
        for info in header.tensors
    }

    def encode(tree: Any) -> bytes:
        metadata, described = tree
        if metadata.get("general.alignment", 32) > 1 << 20:
            raise ValueError("gigabytes of padding")
        return encode_gguf(metadata, described)

    return [header.metadata, tensors], encode


def change_tree(tree: Any, chance: random.Random) -> None:
    """A value is replaced, removed, copied from elsewhere in the tree or put under a word known to minisa."""
    if not tree or not isinstance(tree, dict | list):
        return
    node, key = place_in(tree, chance)
    match chance.randrange(4):
        case 0:
            node[key] = odd_value(chance)
        case 1:
            del node[key]
        case 2:
            there, place = place_in(tree, chance)
            node[key] = copy.deepcopy(there[place])
        case 3 if isinstance(node, dict):
            node[chance.choice(WORDS)] = odd_value(chance)
        case 3:
            node.insert(key, odd_value(chance))


def place_in(tree: Any, chance: random.Random) -> tuple[Any, Any]:
    """A list or dictionary somewhere in the tree, and the key or index of something in it."""
    while True:
        key = chance.choice(list(tree)) if isinstance(tree, dict) else chance.randrange(len(tree))
        child = tree[key]
        if not (isinstance(child, dict | list) and child) or chance.random() < 0.3:
            return tree, key
        tree = child


def odd_value(chance: random.Random) -> object:
    match chance.randrange(4):
        case 0:
            return chance.choice(WORDS)
        case 1:
            return [chance.choice(ODD) for _ in range(chance.randint(1, 4))]
        case 2:
            return {chance.choice(WORDS): chance.choice((*ODD, *WORDS)) for _ in range(chance.randint(1, 4))}
    return chance.choice(ODD)


def changed_bytes(seed: bytes, chance: random.Random, times: int) -> bytes:
    """Bytes flipped, numbers made huge, pieces cut out, doubled or cut off, words put in."""
    content = bytearray(seed)
    for _ in range(times):
        place = int(len(content) * chance.random() ** chance.choice((1, 3)))  # more often near the beginning
        match chance.randrange(6):
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
                word = chance.choice(WORDS).encode()
                content[place : place + len(word)] = word
    return bytes(content)
