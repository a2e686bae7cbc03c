"""Text files as windows of tokens, which every study reads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from minisa import files
from minisa.engine import LLM
from minisa.errors import MinisaError
from minisa.text.tokenizer import check_ids


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file. Raises MinisaError if it cannot be read."""
    try:
        return files.read_text(Path(path))
    except OSError as error:
        raise MinisaError(f"{path}: cannot read the text: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise MinisaError(f"{path}: not UTF-8 at byte {error.start}: convert it, e.g. with iconv") from error


def sha256_of(path: str | Path) -> str:
    """The sha256 of a file's bytes, for provenance. Raises MinisaError if it cannot be read."""
    try:
        return files.sha256_of(Path(path))
    except OSError as error:
        raise MinisaError(f"{path}: cannot read the file: {error.strerror}") from error


def sample(llm: LLM, paths: Sequence[str | Path], length: int, counts: Sequence[int], seed: int) -> list[Tensor]:
    """Windows [count, length] for each of counts, drawn by the seed from all the texts together, and all the rest.

    Raises MinisaError where the texts do not have as many.
    """
    pool = torch.cat([windows(llm, path, length) for path in paths])
    if sum(counts) > len(pool):
        raise MinisaError(
            f"{', '.join(map(str, paths))}: {len(pool)} windows of {length} tokens, {sum(counts)} are needed: "
            "give more text or ask for fewer tokens"
        )
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))
    return [pool[drawn] for drawn in order.split([*counts, len(pool) - sum(counts)])]


def windows(llm: LLM, path: str | Path, length: int, limit: int | None = None) -> Tensor:
    """A text's tokens, cut one after the other into windows: int64 [N, length], on the CPU.

    limit: at most so many windows. What is left at the end is dropped. Where the model's maker begins a text with BOS
    every window does, and holds one token of text less.
    Raises MinisaError where the text is too short for a single window, or has tokens outside the model's vocabulary.
    """
    bos = llm.tokenizer.bos_ids
    if not len(bos) + 2 <= length <= llm.config.longest_seq_len:
        raise MinisaError(f"windows of {length} tokens: expected {len(bos) + 2} to {llm.config.longest_seq_len}")
    ids = llm.tokenizer.encode(read_text(path))
    check_ids(bos + ids, llm.config.vocab_size, f"{path}, by the model's tokenizer,")
    cut = torch.tensor(ids).split(length - len(bos))
    whole = [torch.cat((torch.tensor(bos, dtype=torch.int64), part)) for part in cut if len(part) + len(bos) == length]
    if not whole:
        raise MinisaError(f"{path}: {len(ids)} tokens give no window of {length}: take a longer text")
    return torch.stack(whole[:limit])


def echoing(windows: Tensor, n_bos: int = 0) -> Tensor:
    """windows [N, T], behind their n_bos BOS tokens the second half of every second one its first half again.

    Text in one style asks little of the heads that copy from the context; plans chosen by it alone may cut them off.
    """
    half = (windows.shape[1] - n_bos) // 2
    echoes = windows.clone()
    echoes[1::2, n_bos + half : n_bos + 2 * half] = windows[1::2, n_bos : n_bos + half]
    return echoes
