"""Settings: what the flags of bench.py ask for, checked before anything is loaded."""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from minisa.benchmark.contender import Opening
from minisa.benchmark.presets import CONTEXTS, PEERS, PRESETS, PROMPT_LENGTHS
from minisa.checkpoint import open_checkpoint
from minisa.checkpoint.description import config_from_hf
from minisa.checkpoint.layouts import describing
from minisa.config import ModelConfig
from minisa.device import choose_device
from minisa.errors import MinisaError
from minisa.files import read_json
from minisa.models.registry import ModelEntry, choose_plan, registry, resolve
from minisa.sharing import SharingPlan

GREEDY_PROMPT, GREEDY_TOKENS = 16, 16  # compared between plain and each peer
SLOTS = 64  # the cache's length is a multiple of this


@dataclass(frozen=True, slots=True)
class Settings:
    """One run. opening: of plain attention. shared: the plan to compare it with. repeats: None for the default."""

    name: str
    opening: Opening
    shared: SharingPlan | None
    contexts: tuple[int, ...]
    prompt_lengths: tuple[int, ...]
    new_tokens: int
    repeats: int | None
    against: tuple[str, ...]


def choose(
    *,
    model: str = "",
    random_weights: str | None = None,
    sa: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    quantize: str | None = None,
    kv_dtype: str = "auto",
    compile: bool | None = None,
    batch: int = 1,
    threads: int | None = None,
    contexts: Sequence[int] | None = None,
    prompt_lengths: Sequence[int] | None = None,
    new_tokens: int = 16,
    repeats: int | None = None,
    against: Sequence[str] = (),
) -> Settings:
    """Raises MinisaError for a model, plan, device or length that does not exist or fit, and for a peer not installed.

    random_weights: a shape, which takes the place of model. sa: as for `load`; None for the model's own plan, if any.
    contexts, prompt_lengths: None for CONTEXTS and PROMPT_LENGTHS as far as the model's context reaches.
    """
    for peer in against:
        if not all(map(importlib.util.find_spec, PEERS[peer])):
            raise MinisaError(f'--against {peer}: not installed; pip install "minisa[peers]"')
    path, entry = (None, None) if random_weights is not None else resolve(model)
    if path is not None:
        name, config = path.name, open_checkpoint(path).config
    else:
        name, config, entry = _shape(str(random_weights))
    prompt_lengths = _lengths("--prompt-lengths", prompt_lengths, PROMPT_LENGTHS, config, 0)
    contexts = _lengths("--contexts", contexts, CONTEXTS, config, new_tokens)
    slots = max(contexts[-1] + new_tokens, prompt_lengths[-1], GREEDY_PROMPT + GREEDY_TOKENS)
    opening = Opening(
        path=path,
        config=config,
        plan=SharingPlan.none(config.n_layers),
        device=choose_device(device),
        dtype=dtype,
        kv_dtype=kv_dtype,
        quantize=quantize,
        compile=compile,
        context=min(-(-slots // SLOTS) * SLOTS, config.longest_seq_len),
        batch=batch,
        threads=threads or torch.get_num_threads(),
    )
    shared = _plan(sa, config, entry)
    return Settings(name, opening, shared, contexts, prompt_lengths, new_tokens, repeats, tuple(dict.fromkeys(against)))


def _shape(name: str) -> tuple[str, ModelConfig, ModelEntry | None]:
    """The shape that --random-weights names: one of PRESETS, or a Hugging Face config.json."""
    if name.endswith(".json"):
        try:
            with describing(Path(name)):
                return name, config_from_hf(read_json(Path(name))), None
        except OSError as error:
            raise MinisaError(f"--random-weights {name}: {error.strerror}") from error
    name = name.lower()
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS) or PRESETS
        raise MinisaError(f"--random-weights {name}: no such shape; expected {', '.join(near)}, or a config.json")
    return name, PRESETS[name], registry().get(name)


def _plan(sa: str | None, config: ModelConfig, entry: ModelEntry | None) -> SharingPlan | None:
    try:
        plan = choose_plan(sa or "default", config, entry)
    except MinisaError:
        if sa is None:  # the model has no plan of its own
            return None
        raise
    return plan if plan.followers else None


def _lengths(
    flag: str, asked: Sequence[int] | None, default: tuple[int, ...], config: ModelConfig, reserved: int
) -> tuple[int, ...]:
    """Ascending, each once, with `reserved` tokens of the model's context left free after the longest."""
    limit = (config.max_seq_len if asked is None else config.longest_seq_len) - reserved
    if limit < 0:
        raise MinisaError(f"--new-tokens {reserved}: the model's context is {limit + reserved} tokens; take fewer")
    lengths = tuple(sorted(set(default if asked is None else asked)))
    if asked is not None and lengths[-1] > limit:
        raise MinisaError(f"{flag} {lengths[-1]}: the model's context has room for {limit}; name smaller ones")
    return tuple(length for length in lengths if length <= limit) or (limit,)
