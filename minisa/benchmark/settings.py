"""Settings: what the flags of bench.py mean, checked before anything is measured."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from minisa.benchmark.contender import Opening
from minisa.benchmark.peers import check_peer
from minisa.benchmark.presets import PRESETS
from minisa.checkpoint import open_checkpoint
from minisa.checkpoint.description import config_from_hf
from minisa.checkpoint.layouts import describing
from minisa.config import ModelConfig
from minisa.device import choose_device, choose_dtype, choose_kv_dtype
from minisa.errors import MinisaError
from minisa.files import read_json
from minisa.models.registry import ModelEntry, choose_plan, registry, resolve
from minisa.runners.choice import native_library
from minisa.sharing import SharingPlan

CONTEXTS = (0, 512, 1500, 4096)
PROMPT_LENGTHS = (128, 512, 2048)
GREEDY_PROMPT, GREEDY_TOKENS = 16, 16  # what is compared with the peers' output
SLOTS = 64  # the cache's length is a multiple of this


@dataclass(frozen=True, slots=True)
class Settings:
    """One run. opening: of plain attention. shared: the plan it is compared with, if any."""

    name: str
    opening: Opening
    shared: SharingPlan | None
    contexts: tuple[int, ...]
    prompt_lengths: tuple[int, ...]
    new_tokens: int
    repeats: int | None  # rounds; None for as many as are reasonable
    against: tuple[str, ...] = ()

    @property
    def random_weights(self) -> bool:
        return self.opening.path is None

    @classmethod
    def resolve(
        cls,
        *,
        model: str,
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
        """Raises MinisaError for whatever does not go together.

        sa: as for `load`; None takes the model's own plan, or plain attention alone where it has none.
        contexts, prompt_lengths: None takes CONTEXTS and PROMPT_LENGTHS as far as the model's context reaches.
        The engine builds its C++ step at first use in the background; here that would be in everybody's way, so it is
        waited for, unless compile is False.
        """
        target = choose_device(device)
        path: Path | None = None
        if random_weights is not None:
            name, config, entry = _shape(random_weights)
        else:
            path, entry = resolve(model)
            name, config = path.name, open_checkpoint(path).config
        limit = config.longest_seq_len  # of what is asked for

        def room(asked: Sequence[int] | None) -> int:
            return config.max_seq_len if asked is None else limit

        if new_tokens > (most := room(contexts)):
            raise MinisaError(f"--new-tokens {new_tokens}: the model's context has room for {most}; take fewer")
        contexts = _lengths("--contexts", contexts, CONTEXTS, most - new_tokens)
        prompt_lengths = _lengths("--prompt-lengths", prompt_lengths, PROMPT_LENGTHS, room(prompt_lengths))
        slots = max(max(contexts) + new_tokens, *prompt_lengths, GREEDY_PROMPT + GREEDY_TOKENS)
        library = native_library(config, target, compile, dtype)
        number_format = choose_dtype(dtype, target, native=library is not None)
        opening = Opening(
            path=path,
            config=config,
            plan=SharingPlan.none(config.n_layers),
            device=target,
            dtype=number_format,
            kv_dtype=choose_kv_dtype(kv_dtype, number_format),
            context=min(-(-slots // SLOTS) * SLOTS, limit),
            batch=batch,
            threads=threads or torch.get_num_threads(),
            quantize=quantize,
            compile=compile,
        )
        peers = tuple(dict.fromkeys(against))
        for peer in peers:
            check_peer(peer, opening)
        shared = _plan(sa, config, entry)
        return cls(name, opening, shared, contexts, prompt_lengths, new_tokens, repeats, peers)


def _shape(name: str) -> tuple[str, ModelConfig, ModelEntry | None]:
    """The shape that --random-weights names: one of PRESETS, or a Hugging Face config.json."""
    if name.endswith(".json"):
        try:
            with describing(Path(name)):
                return name, config_from_hf(read_json(Path(name))), None
        except OSError as error:
            raise MinisaError(f"--random-weights {name}: {error.strerror}") from error
    if name.lower() in PRESETS:
        return name.lower(), PRESETS[name.lower()], registry().get(name.lower())
    near = difflib.get_close_matches(name.lower(), PRESETS, n=3) or list(PRESETS)
    raise MinisaError(f"--random-weights {name}: no such shape; expected {', '.join(near)}, or a config.json")


def _plan(sa: str | None, config: ModelConfig, entry: ModelEntry | None) -> SharingPlan | None:
    try:
        plan = choose_plan("default" if sa is None else sa, config, entry)
    except MinisaError:
        if sa is None:
            return None
        raise
    return plan if plan.followers else None


def _lengths(flag: str, asked: Sequence[int] | None, default: tuple[int, ...], limit: int) -> tuple[int, ...]:
    """Ascending and each once: a context is filled by going on from the one before."""
    lengths = tuple(sorted(set(default if asked is None else asked)))
    fitting = tuple(length for length in lengths if length <= limit)
    if asked is not None and fitting != lengths:
        raise MinisaError(f"{flag} {lengths[-1]}: the model's context has room for {limit}; name smaller ones")
    return fitting or (limit,)
