"""Tiny checkpoints with all that load needs: their tokens are bytes, a few merges and a few special ones."""

from __future__ import annotations

from pathlib import Path

from minisa.config import ModelConfig
from tests.tiny import random_weights, tiny_config, write_gguf, write_hf
from tests.vocabularies import CHATML, byte_level_json, gguf_byte_level, write_json

VOCABULARY = gguf_byte_level(byte_level_json())
N_TOKENS = len(VOCABULARY["tokenizer.ggml.tokens"])


def loadable_gguf(path: Path, config: ModelConfig, seed: int = 0) -> Path:
    return write_gguf(path, config, random_weights(config, seed), metadata=VOCABULARY)


def loadable_hf(folder: Path, config: ModelConfig) -> Path:
    write_hf(folder, config, random_weights(config))
    write_json(folder / "tokenizer.json", byte_level_json())
    return folder


def chat_model(folder: Path, **shape: int) -> Path:
    """A checkpoint with a chat format."""
    loadable_hf(folder, tiny_config(vocab_size=N_TOKENS, max_seq_len=256, **shape))
    write_json(folder / "tokenizer_config.json", {"chat_template": CHATML})
    return folder
