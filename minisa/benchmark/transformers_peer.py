"""Hugging Face's transformers on minisa's weights: the best of its own ways to run, for each measurement."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from minisa.benchmark.contender import LEAD_IN, Contender, Facts, Opening
from minisa.benchmark.gguf_writer import foreign_name
from minisa.benchmark.measure import timed
from minisa.checkpoint.names import HUGGING_FACE
from minisa.config import ModelConfig
from minisa.device import DTYPES, peak_memory
from minisa.model import Transformer
from minisa.rope import rope_frequencies

CHUNK = 512  # tokens at a time when a context is filled, which is not timed


class TransformersPeer(Contender):
    """Its ways: eager with a growing cache, eager with a static one, and a compiled step with a static one (on a GPU,
    or with --compile)."""

    def __init__(self, opening: Opening) -> None:
        torch.set_num_threads(opening.threads)
        self._opening = opening
        self._memory_before = peak_memory(opening.device)
        self._model = build(opening.weights(DTYPES[opening.dtype]))
        self._ways = {"eager": _Way(self._model, opening)}
        if opening.config.sliding_window is None:  # its static cache forgets what is behind the window
            self._ways["static"] = _Way(self._model, opening, static=True)
            on_gpu = opening.device.type == "cuda"
            if on_gpu if opening.compile is None else opening.compile:
                mode = "reduce-overhead" if on_gpu else None  # as its own generate would: with CUDA graphs
                step = torch.compile(self._model.forward, dynamic=False, mode=mode)
                self._ways["compiled"] = _Way(self._model, opening, static=True, step=step)
        self._chosen: dict[str, str] = {}
        self._context: Sequence[int] = ()

    def facts(self) -> Facts:
        import transformers

        opening = self._opening
        quantized = ", not quantized" if opening.quantize else ""
        chosen = "".join(f"; {what}: {way}" for what, way in self._chosen.items())
        return Facts(
            weight_bytes=sum({p.data_ptr(): p.nbytes for p in self._model.parameters()}.values()),  # tied ones once
            dtype=DTYPES[opening.dtype],
            kv_dtype=DTYPES[opening.dtype],
            memory_before=self._memory_before,
            peak_memory=peak_memory(opening.device),
            detail=f"transformers {transformers.__version__}, {opening.dtype}{quantized}{chosen}",
        )

    @torch.inference_mode()
    def feed(self, tokens: Sequence[int], start: int, row: int = 0) -> int:
        way = self._ways["eager"]
        if start == 0:
            way.cache = way.new_cache()
        return int(way.feed([tokens]).argmax())

    @torch.inference_mode()
    def prefill(self, tokens: Sequence[int]) -> float:
        def run(way: _Way) -> list[float]:
            way.cache, way.filled = way.new_cache(), 0
            return [timed(lambda: way.feed([tokens]), self._opening.device)[0]]

        names = [name for name in self._ways if name != "compiled"]  # it would compile for every length
        return self._best(f"prefill {len(tokens)}", names, run)[0]

    def fill(self, tokens: Sequence[int], batch: int) -> None:
        self._context = tokens

    @torch.inference_mode()
    def decode(self, context: int, steps: int) -> list[float]:
        def run(way: _Way) -> list[float]:
            way.fill(self._context)
            return way.decode(context, steps)

        return self._best(f"decode at {context}", list(self._ways), run)

    def _best(self, what: str, names: list[str], run: Callable[[_Way], list[float]]) -> list[float]:
        """run with the way that is fastest at it; the first time, every way is tried to find out which."""
        if what not in self._chosen:
            speeds = {}
            for name in names:
                try:
                    run(self._ways[name])  # warm-up
                    speeds[name] = statistics.median(run(self._ways[name]))
                except Exception as error:  # whatever its compiler stumbles over
                    if name != "compiled":
                        raise
                    del self._ways[name]
                    self._chosen[name] = f"failed ({type(error).__name__})"
            self._chosen[what] = min(speeds, key=lambda name: speeds[name])
        return run(self._ways[self._chosen[what]])


class _Way:
    """One way to run the model, with a cache of its own. step: what decodes; None for the model's forward."""

    def __init__(
        self, model: Any, opening: Opening, *, static: bool = False, step: Callable[..., Any] | None = None
    ) -> None:
        self._model, self._opening, self._static = model, opening, static
        self._step = step or model.forward
        self.cache: Any = None
        self.filled = 0

    def new_cache(self) -> Any:
        from transformers import DynamicCache, StaticCache

        return StaticCache(self._model.config, max_cache_len=self._opening.context) if self._static else DynamicCache()

    def feed(self, rows: list[Sequence[int]]) -> Tensor:
        """Logits [B, vocab_size] after the last tokens of rows of the same length."""
        ids = torch.tensor(rows, device=self._opening.device)
        return self._model(ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits[:, -1]

    def fill(self, tokens: Sequence[int]) -> None:
        if self.filled == 0:
            self.cache = self.new_cache()
        for start in range(self.filled, len(tokens), CHUNK):
            self.feed([tokens[start : start + CHUNK]] * self._opening.batch)
        self.filled = max(self.filled, len(tokens))

    def decode(self, context: int, steps: int) -> list[float]:
        tokens = torch.ones(self._opening.batch, 1, dtype=torch.int64, device=self._opening.device)

        def step() -> Tensor:
            return self._step(tokens, past_key_values=self.cache, use_cache=True).logits[:, -1:].argmax(-1)

        times = []
        for i in range(-LEAD_IN, steps):
            if i <= 0:
                _rewind(self.cache, context)
            seconds, tokens = timed(step, self._opening.device)
            times.append(seconds)
        _rewind(self.cache, context)
        return times[LEAD_IN:]


def build(model: Transformer) -> Any:
    """transformers' LlamaForCausalLM (or Mistral's, with a sliding window) around the very same weights."""
    import transformers

    config = model.config
    with torch.device("meta"):
        peer = transformers.AutoModelForCausalLM.from_config(peer_config(config))
    weights = {foreign_name(name, HUGGING_FACE, "model.layers."): tensor for name, tensor in model.state_dict().items()}
    if config.tie_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    peer.load_state_dict(weights, assign=True)
    # Its own buffers were made on the meta device; ours also know the factors that GGUF files carry.
    rotary, frequencies = peer.model.rotary_emb, rope_frequencies(config).to(model.tok_embeddings.weight.device)
    rotary.inv_freq = rotary.original_inv_freq = frequencies
    rotary.attention_scaling = config.attention_factor
    transformers.logging.set_verbosity_error()
    return peer.eval()


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
