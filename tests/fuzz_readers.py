"""What fuzz.py and test_under_fire.py change and read: a sound file for each reader, made anew in a folder."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import minisa
from minisa.checkpoint import load_weights, open_checkpoint, with_delta, write_delta
from minisa.errors import MinisaError
from minisa.models.registry import choose_plan
from minisa.sharing import Delta, SharingPlan
from minisa.study.resuming import read_state, write_state
from minisa.text.chat import find_template
from minisa.text.tokenizer import Tokenizer, load_tokenizer
from tests.encode import encode_gguf
from tests.loadable import N_TOKENS, VOCABULARY, loadable_gguf
from tests.tiny import (
    empty_model,
    random_weights,
    split_gguf,
    tiny_config,
    write_gguf,
    write_hf,
    write_meta,
    write_mistral,
)
from tests.vocabularies import (
    CHATML,
    byte_level_json,
    gguf_sentencepiece,
    sentencepiece_json,
    sentencepiece_model,
    tekken_json,
    tiktoken_model,
    write_json,
)

CONFIG = tiny_config(dim=32, n_layers=1, n_heads=2, n_kv_heads=1, hidden_dim=32, vocab_size=32)


@dataclass
class Reader:
    """file: what is changed, a sound one to begin with. read: what is done with it. named: what every message names."""

    file: Path
    read: Callable[[], object]
    named: Path | str
    seed: bytes = field(init=False)

    def __post_init__(self) -> None:
        self.seed = self.file.read_bytes()


def load(path: Path) -> None:
    checkpoint = open_checkpoint(path)
    if checkpoint.config.n_layers <= 4 and sum(tensor.shape[0] for tensor in checkpoint.tensors.values()) < 1 << 20:
        load_weights(empty_model(checkpoint.config), checkpoint, device="cpu", dtype=torch.float32)


def tokenize(path: Path) -> Tokenizer:
    tokenizer = load_tokenizer(path)
    tokenizer.decode(tokenizer.encode("Hello world, 1234  é\n\n"))
    return tokenizer


def written(write: Callable[..., Path], name: str, **options: Any) -> Callable[[Path], Reader]:
    """A file of a checkpoint's folder."""

    def reader(folder: Path) -> Reader:
        path = write(folder, CONFIG, random_weights(CONFIG), **options)
        return Reader(path / name, lambda: load(path), path)

    return reader


def vocabulary(name: str, content: Callable[[], bytes]) -> Callable[[Path], Reader]:
    def reader(folder: Path) -> Reader:
        file = folder / name
        file.write_bytes(content())
        return Reader(file, lambda: tokenize(file), folder)

    return reader


def gguf(folder: Path) -> Reader:
    metadata = {"nested": [[1, 2], ["x"]], "flag": True}
    file = write_gguf(folder / "m.gguf", CONFIG, random_weights(CONFIG), type="Q4_1", metadata=metadata)
    return Reader(file, lambda: load(file), file)


def gguf_part(folder: Path) -> Reader:
    """Of a model in three parts, the second, which the first is opened with."""
    first, second, _ = split_gguf(loadable_gguf(folder / "m.gguf", CONFIG), 3)
    return Reader(second, lambda: load(first), folder)


def tokenizer_in_gguf(folder: Path) -> Reader:
    file = loadable_gguf(folder / "m.gguf", CONFIG)
    return Reader(file, lambda: tokenize(file), file)


def chat(folder: Path) -> Reader:
    """From one file to an answer. What a vocabulary lacks for a chat format is told without the file's name."""
    shape = {"dim": 32, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "hidden_dim": 32, "max_seq_len": 64}
    config = tiny_config(**shape, vocab_size=N_TOKENS)
    metadata = VOCABULARY | {"tokenizer.chat_template": CHATML}
    file = write_gguf(folder / "m.gguf", config, random_weights(config), metadata=metadata)

    def answer() -> None:
        llm = minisa.load(file, device="cpu", dtype="fp32", compile=False, max_seq_len=64)
        for chunk in llm.chat([{"role": "user", "content": "Hello"}], max_new_tokens=2, seed=0):
            assert isinstance(chunk.text, str)

    return Reader(file, answer, "")


def settings(folder: Path) -> Reader:
    (folder / "tokenizer.model").write_bytes(sentencepiece_model())
    decoder = {"330": {"content": "<x>", "special": True}}
    named = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
    templates = [{"name": "default", "template": CHATML}]
    content = {"added_tokens_decoder": decoder, "chat_template": templates, **named}
    file = write_json(folder / "tokenizer_config.json", content)
    return Reader(file, lambda: tokenize(folder), folder)


def chat_template(folder: Path) -> Reader:
    """Whatever a template does, it gives ids or is refused."""
    (folder / "tokenizer.model").write_bytes(sentencepiece_model())
    file = folder / "chat_template.jinja"
    file.write_text("{% set talk = messages[:] %}" + CHATML.replace("messages", "talk"), encoding="utf-8")

    def read() -> None:
        tokenizer = tokenize(folder)
        with contextlib.suppress(MinisaError):  # of a template, not of a file
            find_template(folder, tokenizer).ids([{"role": "user", "content": " Hi!\n"}])

    return Reader(file, read, folder)


def plan(folder: Path) -> Reader:
    file = folder / "plan.json"
    stored = write_delta(folder / "plan.safetensors", {"layers.2.attention.wo.weight": torch.ones(64, 64)})
    SharingPlan.following(4, {2: 1, 3: 1}, {2: [1, 0, 3, 2]}, stored).save(file, {"model": "x", "steps": [1, 2]})
    return Reader(file, lambda: choose_plan(file, tiny_config()), file)


def delta(folder: Path) -> Reader:
    """The sha256 is that of the input: it is the rest that must hold."""
    config = tiny_config()
    checkpoint = open_checkpoint(write_hf(folder / "model", config, random_weights(config)))
    file = folder / "plan.safetensors"
    stored = write_delta(file, {"layers.2.attention.wo.weight": torch.ones(64, 64)})

    def read() -> None:
        sha256 = hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else stored.sha256
        found = with_delta(checkpoint, Delta(file, sha256))
        load_weights(empty_model(config), found, device="cpu", dtype=torch.float32)

    return Reader(file, read, folder)


def state(folder: Path) -> Reader:
    file = folder / "state"
    write_state(file, {"length": 8}, {"step": 3, "weights": {"wo": torch.ones(4, 4)}})
    return Reader(file, lambda: read_state(file, {"length": 8}), file)


READERS: dict[str, Callable[[Path], Reader]] = {
    "safetensors": written(write_hf, "model.safetensors"),
    "index": written(write_hf, "model.safetensors.index.json", shards=2),
    "pytorch index": written(write_hf, "pytorch_model.bin.index.json", shards=2, suffix=".bin"),
    "config.json": written(write_hf, "config.json"),
    "params.json": written(write_meta, "params.json"),
    "mistral": written(write_mistral, "consolidated.safetensors"),
    "pth": written(write_meta, "consolidated.00.pth"),
    "gguf": gguf,
    "gguf part": gguf_part,
    "tokenizer.model": vocabulary("tokenizer.model", sentencepiece_model),
    "tiktoken": vocabulary("tokenizer.model", tiktoken_model),
    "tokenizer.json": vocabulary("tokenizer.json", lambda: json.dumps(byte_level_json()).encode()),
    "sentencepiece.json": vocabulary(
        "tokenizer.json", lambda: json.dumps(sentencepiece_json(sentencepiece_model())).encode()
    ),
    "tekken.json": vocabulary("tekken.json", lambda: json.dumps(tekken_json()).encode()),
    "tokenizer.gguf": tokenizer_in_gguf,
    "sentencepiece.gguf": vocabulary("m.gguf", lambda: encode_gguf(gguf_sentencepiece(sentencepiece_model()), {})),
    "tokenizer_config.json": settings,
    "chat template": chat_template,
    "chat": chat,
    "plan": plan,
    "delta": delta,
    "state": state,
}
