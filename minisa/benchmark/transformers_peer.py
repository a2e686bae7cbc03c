"""Hugging Face's transformers on minisa's weights: the best of its own ways to run, for each measurement."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor

from minisa.benchmark.contender import LEAD_IN, Facts, Opening
from minisa.benchmark.measure import timed
from minisa.benchmark.peers import foreign_name
from minisa.checkpoint.names import HUGGING_FACE
from minisa.config import ModelConfig
from minisa.device import dtype_name, peak_memory
from minisa.model import Transformer
from minisa.rope import rope_frequencies

COMPILE_LIMIT = 180  # seconds; a user would hardly wait longer
TRIAL_STEPS = 6
CHUNK = 512  # tokens at a time when a context is filled, which nobody times


class TransformersPeer:
    """A Contender. Its ways: eager with a growing cache, eager with a static one, compiled with a static one."""

    def __init__(self, opening: Opening) -> None:
        import transformers

        torch.set_num_threads(opening.threads)
        self._opening = opening
        before = peak_memory(opening.device)
        self._model = build(opening.weights(opening.dtype))
        self._facts = Facts(
            weight_bytes=sum({p.data_ptr(): p.nbytes for p in self._model.parameters()}.values()),  # tied ones once
            memory_before=before,
            kv_itemsize=opening.dtype.itemsize,
            detail=f"transformers {transformers.__version__}, {dtype_name(opening.dtype)}"
            + (", not quantized" if opening.quantize else ""),
        )
        self._ways: dict[str, _Way] = {"eager": _Way(self._model, opening, static=False)}
        if opening.config.sliding_window is None:  # its static cache forgets what is behind the window
            self._ways["static"] = _Way(self._model, opening, static=True)
            if opening.compile is not False:
                self._ways["compiled"] = _Way(self._model, opening, static=True, compile=True)
        self._chosen: dict[str, str] = {}
        self._context: list[int] = []

    def facts(self) -> Facts:
        return self._facts

    def chosen(self) -> dict[str, str]:
        """Which way was the fastest, for "prefill 512", "decode at 0" and so on; and which did not work at all."""
        return self._chosen

    @torch.inference_mode()
    def prefill(self, tokens: list[int]) -> float:
        names = [name for name in self._ways if name != "compiled"]  # it would compile for every length
        return self._best(f"prefill {len(tokens)}", lambda way: [way.prefill(tokens)], names)[0]

    @torch.inference_mode()
    def fill(self, tokens: list[int]) -> None:
        self._context = tokens

    @torch.inference_mode()
    def decode(self, context: int, steps: int) -> list[float]:
        def run(way: _Way, steps: int = steps) -> list[float]:
            way.fill(self._context)
            return way.decode(context, steps)

        return self._best(f"decode at {context}", run, list(self._ways), lambda way: run(way, TRIAL_STEPS))

    @torch.inference_mode()
    def greedy(self, tokens: list[int], new_tokens: int) -> list[int]:
        return self._ways["eager"].greedy(tokens, new_tokens)

    def peak_memory(self) -> int:
        return peak_memory(self._opening.device)

    def _best(
        self,
        what: str,
        run: Callable[[_Way], list[float]],
        names: list[str],
        trial: Callable[[_Way], list[float]] | None = None,
    ) -> list[float]:
        """run with the way that is fastest at it; the first time, every way is tried to find out which."""
        if what not in self._chosen:
            speeds = {}
            for name in names:
                if name not in self._ways:
                    continue
                try:
                    with _time_limit(COMPILE_LIMIT):
                        (trial or run)(self._ways[name])  # warm-up
                        speeds[name] = min((trial or run)(self._ways[name]))
                except Exception as error:  # whatever a peer's compiler stumbles over
                    if name == "eager":
                        raise
                    del self._ways[name]
                    self._chosen[name] = f"gave up ({type(error).__name__})"
            self._chosen[what] = min(speeds, key=lambda name: speeds[name])
        return run(self._ways[self._chosen[what]])


class _Way:
    """One way to run the model, with a cache of its own."""

    def __init__(self, model: Any, opening: Opening, *, static: bool, compile: bool = False) -> None:
        self._model = model
        self._device = opening.device
        self._batch = opening.batch
        self._static = static
        self._slots = opening.context
        # On a GPU as its own generate would: with CUDA graphs.
        mode = "reduce-overhead" if opening.device.type == "cuda" else None
        self._step = torch.compile(model.forward, dynamic=False, mode=mode) if compile else model.forward
        self._cache: Any = None  # allocated on first use
        self._filled = 0

    def new_cache(self) -> Any:
        from transformers import DynamicCache, StaticCache

        return StaticCache(self._model.config, max_cache_len=self._slots) if self._static else DynamicCache()

    def prefill(self, tokens: list[int]) -> float:
        cache = self.new_cache()
        return timed(lambda: self._feed([tokens], cache), self._device)[0]

    def fill(self, tokens: list[int]) -> None:
        if self._cache is None:
            self._cache = self.new_cache()
        for start in range(self._filled, len(tokens), CHUNK):
            self._feed([tokens[start : start + CHUNK]] * self._batch, self._cache)
        self._filled = max(self._filled, len(tokens))

    def decode(self, context: int, steps: int) -> list[float]:
        token = torch.ones(self._batch, 1, dtype=torch.int64, device=self._device)
        times = []
        for i in range(-LEAD_IN, steps):
            if i <= 0:
                _rewind(self._cache, context)
            seconds, output = timed(
                lambda token=token: self._step(token, past_key_values=self._cache, use_cache=True),  # type: ignore[misc]
                self._device,
            )
            token = output.logits[:, -1:].argmax(-1)
            times.append(seconds)
        _rewind(self._cache, context)
        return times[LEAD_IN:]

    def greedy(self, tokens: list[int], new_tokens: int) -> list[int]:
        cache = self.new_cache()
        chosen = [int(self._feed([tokens], cache).argmax())]
        while len(chosen) < new_tokens:
            chosen.append(int(self._feed([chosen[-1:]], cache).argmax()))
        return chosen

    def _feed(self, tokens: list[list[int]], cache: Any) -> Tensor:
        ids = torch.tensor(tokens, device=self._device)
        return self._model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]


def build(model: Transformer) -> Any:
    """transformers' LlamaForCausalLM (or Mistral's, with a sliding window) around the very same weights."""
    import transformers

    config = model.config
    with torch.device("meta"):
        peer = peer_class(config)(peer_config(config))
    weights = {foreign_name(name, HUGGING_FACE, "model.layers."): tensor for name, tensor in model.state_dict().items()}
    if config.tie_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    peer.load_state_dict(weights, assign=True)
    # Its own buffers were made on the meta device; ours also know the factors that GGUF files carry.
    frequencies = rope_frequencies(config).to(model.tok_embeddings.weight.device)
    peer.model.rotary_emb.inv_freq = frequencies
    peer.model.rotary_emb.original_inv_freq = frequencies
    peer.model.rotary_emb.attention_scaling = config.attention_factor
    transformers.logging.set_verbosity_error()
    return peer.eval()


def peer_class(config: ModelConfig) -> Any:
    import transformers

    return transformers.LlamaForCausalLM if config.sliding_window is None else transformers.MistralForCausalLM


def peer_config(config: ModelConfig) -> Any:
    """RoPE scaling apart, which `build` puts in as frequencies."""
    import transformers

    options: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "intermediate_size": config.hidden_dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "attn_implementation": "sdpa",
    }
    if config.sliding_window is not None:
        return transformers.MistralConfig(sliding_window=config.sliding_window, **options)
    return transformers.LlamaConfig(**options)


def _rewind(cache: Any, length: int) -> None:
    """Make a cache hold its first `length` tokens only. (Cache.crop means another thing in every major version.)"""
    for layer in cache.layers:
        if isinstance(counter := getattr(layer, "cumulative_length", None), Tensor):
            counter.fill_(length)
        elif getattr(layer, "keys", None) is not None:
            layer.keys = layer.keys[:, :, :length]
            layer.values = layer.values[:, :, :length]


@contextmanager
def _time_limit(seconds: int) -> Iterator[None]:
    """TimeoutError in the body after so many seconds; for the main thread of a process."""

    def expire(*_: object) -> NoReturn:
        raise TimeoutError

    previous = signal.signal(signal.SIGALRM, expire)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
