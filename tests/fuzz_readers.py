"""What tests/fuzz.py changes and reads: a sound file for each reader of files, made anew in a folder."""

from __future__ import annotations

import contextlib
import hashlib
import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

import minisa
from minisa.checkpoint import load_weights, open_checkpoint, with_delta, write_delta
from minisa.models.registry import choose_plan, read_registry
from minisa.sharing import Delta, SharingPlan
from minisa.study.results import Results
from minisa.study.tasks import TASKS, read_questions, read_rows
from minisa.text.chat_format import find_dialog
from minisa.text.templates import Beyond, Refused, written
from minisa.text.tokenizer import Tokenizer, load_tokenizer
from tests.encode import encode_gguf, repack_zip
from tests.loadable import N_TOKENS, VOCABULARY, loadable_gguf
from tests.study_rows import ROWS, write_rows
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
    jinja_writes,
    sentencepiece_json,
    sentencepiece_model,
    tekken_json,
    tiktoken_model,
    write_json,
)

CONFIG = tiny_config(dim=32, n_layers=1, n_heads=2, n_kv_heads=1, hidden_dim=32, vocab_size=32)


def load(path: Path) -> None:
    checkpoint = open_checkpoint(path)
    if checkpoint.config.n_layers <= 4 and sum(tensor.shape[0] for tensor in checkpoint.tensors.values()) < 1 << 20:
        load_weights(empty_model(checkpoint.config), checkpoint, device="cpu", dtype=torch.float32)


def tokenize(path: Path) -> Tokenizer:
    tokenizer = load_tokenizer(path)
    tokenizer.decode(tokenizer.encode("Hello world, 1234  é\n\n"))
    find_dialog(path, tokenizer)
    return tokenizer


def answer(path: Path) -> None:
    llm = minisa.load(path, device="cpu", dtype="fp32", compile=False, max_seq_len=64)
    for chunk in llm.chat([{"role": "user", "content": "Hello"}], max_new_tokens=2, seed=0):
        assert isinstance(chunk.text, str)


@dataclass
class Reader:
    """file: what is changed, a sound one to begin with. read: what is done with it."""

    file: Path
    read: Callable[[], object]
    named: Path | str  # what every message names
    rewrite: Callable[[bytes], None] | None = None  # puts an input in its place, where that is not simply the file
    seed: bytes = field(init=False)

    def __post_init__(self) -> None:
        self.seed = self.file.read_bytes()


def hugging_face(folder: Path, name: str) -> Reader:
    shards, suffix = (2 if "index" in name else 1), (".bin" if ".bin" in name else ".safetensors")
    path = write_hf(folder, CONFIG, random_weights(CONFIG), shards, suffix=suffix)
    return Reader(path / name, lambda: load(path), path)


def gguf(folder: Path, metadata: dict[str, object]) -> Reader:
    path = write_gguf(folder / "m.gguf", CONFIG, random_weights(CONFIG), type="Q4_1", metadata=metadata)
    return Reader(path, lambda: load(path), path)


def pth(folder: Path, *, pickle: bool) -> Reader:
    path = write_meta(folder, CONFIG, random_weights(CONFIG))
    file = path / "consolidated.00.pth"
    reader = Reader(file, lambda: load(path), path)
    if pickle:
        whole = file.read_bytes()
        with zipfile.ZipFile(file) as archive:
            reader.seed = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))

        def rewrite(content: bytes) -> None:
            file.write_bytes(whole)
            repack_zip(file, lambda name, part: content if name.endswith("data.pkl") else part)

        reader.rewrite = rewrite
    return reader


def described(folder: Path, write: Callable[..., Path], name: str) -> Reader:
    path = write(folder, CONFIG, random_weights(CONFIG))
    return Reader(path / name, lambda: load(path), path)


def tokenizer_file(folder: Path, name: str, content: bytes) -> Reader:
    file = folder / name
    file.write_bytes(content)
    return Reader(file, lambda: tokenize(file), folder)


def tokenizer_in_gguf(folder: Path) -> Reader:
    file = loadable_gguf(folder / "m.gguf", CONFIG)
    return Reader(file, lambda: tokenize(file), file)


def sentencepiece_in_gguf(folder: Path) -> Reader:
    file = folder / "m.gguf"
    file.write_bytes(encode_gguf(gguf_sentencepiece(sentencepiece_model()), {}))
    return Reader(file, lambda: tokenize(file), file)


def chat(folder: Path) -> Reader:
    """From one file to an answer. What a vocabulary lacks for a chat format is told without the file's name."""
    config = tiny_config(
        dim=32, n_layers=2, n_heads=2, n_kv_heads=1, hidden_dim=32, vocab_size=N_TOKENS, max_seq_len=64
    )
    metadata = VOCABULARY | {"tokenizer.chat_template": CHATML}
    file = write_gguf(folder / "m.gguf", config, random_weights(config), metadata=metadata)
    return Reader(file, lambda: answer(file), "")


def gguf_part(folder: Path) -> Reader:
    """Of a model in three parts, the second, which the first is opened with."""
    whole = loadable_gguf(folder / "m.gguf", CONFIG)
    first, second, _ = split_gguf(whole, 3)
    return Reader(second, lambda: load(first), folder)


def settings(folder: Path) -> Reader:
    (folder / "tokenizer.model").write_bytes(sentencepiece_model())
    file = write_json(
        folder / "tokenizer_config.json",
        {"added_tokens_decoder": {"330": {"content": "<x>", "special": True}}, "bos_token": "<s>", "eos_token": "</s>",
         "add_bos_token": True, "chat_template": [{"name": "default", "template": CHATML}]},
    )  # fmt: skip
    return Reader(file, lambda: tokenize(folder), folder)


def chat_template(folder: Path) -> Reader:
    """What is followed must be what Jinja writes."""
    (folder / "tokenizer.model").write_bytes(sentencepiece_model())
    file, talk = folder / "chat_template.jinja", [{"role": "user", "content": " Hi!\n"}]
    file.write_text(
        "{% set ns = namespace(system='') %}{% if messages[0].role == 'system' %}{% set talk = messages[1:] %}"
        "{% set ns.system = messages[0].content | trim %}{% else %}{% set talk = messages %}{% endif %}"
        "{% if ns.system|length > 0 %}{{ '<|im_start|>system\\n' ~ ns.system ~ '<|im_end|>\\n' }}{% endif %}"
        + CHATML.replace("messages", "talk")
    )

    def read() -> None:
        template = tokenize(folder).chat_template
        with contextlib.suppress(Beyond, Refused, NameError):  # the last is Jinja's for 1e999
            assert template is None or written(template, talk, "<s>", "</s>") == jinja_writes(template, talk)

    return Reader(file, read, folder)


def plan(folder: Path) -> Reader:
    file = folder / "plan.json"
    delta = write_delta(folder / "plan.safetensors", {"layers.2.attention.wo.weight": torch.ones(64, 64)})
    SharingPlan.following(4, {2: 1, 3: 1}, {2: [1, 0, 3, 2]}, delta).save(file, {"model": "x", "steps": [1, 2]})
    return Reader(file, lambda: choose_plan(file, tiny_config()), file)


def delta(folder: Path) -> Reader:
    """The sha256 is that of the input: it is the rest that must hold."""
    config = tiny_config()
    checkpoint = open_checkpoint(write_hf(folder / "model", config, random_weights(config)))
    file = folder / "plan.safetensors"
    stored = write_delta(file, {"layers.2.attention.wo.weight": torch.ones(64, 64)})

    def read() -> None:
        sha256 = hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else stored.sha256
        found = Delta(file, sha256)
        load_weights(empty_model(config), with_delta(checkpoint, found), device="cpu", dtype=torch.float32)

    return Reader(file, read, folder)


def task_rows(folder: Path) -> Reader:
    """A row of each task, one after the other."""
    file = write_rows(folder / "rows.jsonl", *(ROWS[name] for name in TASKS))

    def read() -> None:
        for task, row in zip(TASKS.values(), read_rows(file), strict=False):
            read_questions(task, write_rows(folder / "row.jsonl", row), 0, None)

    return Reader(file, read, folder)


def results(folder: Path) -> Reader:
    file, settings = folder / "results.jsonl", {"task": "piqa"}

    def read() -> None:
        kept = Results(file, settings, ("acc",))
        kept.variant("plain", "none")
        kept.close()

    read()
    with file.open("a") as lines:
        lines.write('{"variant": "plain", "item": 3, "scores": {"acc": [1.0, 1.0]}}\n')
    return Reader(file, read, file)


def models_toml(folder: Path) -> Reader:
    file = folder / "models.toml"
    file.write_bytes((Path(__file__).parents[1] / "weights" / "models.toml").read_bytes()[:2500].rpartition(b"\n\n")[0])
    return Reader(file, lambda: read_registry(file), file)


READERS: dict[str, Callable[[Path], Reader]] = {
    "safetensors": lambda folder: hugging_face(folder, "model.safetensors"),
    "index": lambda folder: hugging_face(folder, "model.safetensors.index.json"),
    "pytorch index": lambda folder: hugging_face(folder, "pytorch_model.bin.index.json"),
    "config.json": lambda folder: hugging_face(folder, "config.json"),
    "params.json": lambda folder: described(folder, write_meta, "params.json"),
    "mistral": lambda folder: described(folder, write_mistral, "consolidated.safetensors"),
    "gguf": lambda folder: gguf(folder, {"nested": [[1, 2], ["x"]], "flag": True}),
    "gguf part": gguf_part,
    "pth": lambda folder: pth(folder, pickle=False),
    "pickle": lambda folder: pth(folder, pickle=True),
    "tokenizer.model": lambda folder: tokenizer_file(folder, "tokenizer.model", sentencepiece_model()),
    "tokenizer.json": lambda folder: tokenizer_file(
        folder, "tokenizer.json", json.dumps(byte_level_json()).encode()
    ),
    "sentencepiece.json": lambda folder: tokenizer_file(
        folder, "tokenizer.json", json.dumps(sentencepiece_json(sentencepiece_model())).encode()
    ),
    "tekken.json": lambda folder: tokenizer_file(folder, "tekken.json", json.dumps(tekken_json()).encode()),
    "tiktoken": lambda folder: tokenizer_file(folder, "tokenizer.model", tiktoken_model()),
    "tokenizer.gguf": tokenizer_in_gguf,
    "sentencepiece.gguf": sentencepiece_in_gguf,
    "chat": chat,
    "tokenizer_config.json": settings,
    "chat template": chat_template,
    "plan": plan,
    "delta": delta,
    "task rows": task_rows,
    "results": results,
    "models.toml": models_toml,
}  # fmt: skip
