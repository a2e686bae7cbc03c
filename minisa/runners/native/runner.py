"""NativeRunner: the Runner interface over the C++ step."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from minisa.cache import StaticCache
from minisa.config import ModelConfig
from minisa.device import one_torch_thread
from minisa.model import Layer, Transformer
from minisa.rope import rope_angles
from minisa.runners.eager import RunnerBase, joined
from minisa.runners.native.packing import FORMATS, LANES, PANEL, Packed, interleave, pack_bf16, pack_int4, pack_int8

CACHE_FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float8_e4m3fn: 2}  # as in tables.h
CHUNK = 64  # rows of prefill at a time, or as many as have room for their attention weights until their span ends
SCRATCH = 128 << 20  # bytes of this room, but for a batch that needs more to decode


class _Matrix(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), *((name, ctypes.c_int32) for name in ("format", "rows", "cols", "reserved"))]


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("attention_norm", "ffn_norm")),
        *((name, _Matrix) for name in ("wqkv", "wo", "w13", "w2")),
        *((name, ctypes.c_void_p) for name in ("keys", "values", "head_map")),
        *((name, ctypes.c_int32) for name in ("span", "reserved")),
    ]


_SIZES = (
    *("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim", "vocab_size"),
    *("cache_slots", "sliding_window", "n_spans", "cache_format"),
)


class _Model(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in _SIZES),
        ("norm_eps", ctypes.c_float),
        *((name, _Matrix) for name in ("embedding", "head")),
        ("final_norm", ctypes.c_void_p),
        ("layers", ctypes.POINTER(_Layer)),
    ]


def supports(config: ModelConfig) -> bool:
    """Whether the model's widths fill whole panels and vectors."""
    widths = (config.dim, config.hidden_dim, config.n_heads * config.head_dim)
    return all(width % PANEL == 0 for width in widths) and config.head_dim % (2 * LANES) == 0


class NativeRunner(RunnerBase):
    """Runs a model in the C++ step. Its matrices, bf16 or quantized, move out of `model` and into panels, one by one.

    The caches it is given are fp32, bf16 or fp8, on the CPU. Before each product activations are rounded to bf16, or
    for quantized weights to eight bits and a scale for every 32; sums and attention are fp32. A token's logits are the
    same to the bit whatever rows it is fed with and however many threads there are.
    """

    asynchronous = False
    fixed_batch = False
    name = "C++ step"

    def __init__(self, model: Transformer, library: ctypes.CDLL, n_threads: int | None = None) -> None:
        self.model = model
        self.library = library
        self.n_threads = n_threads or min(torch.get_num_threads(), _usable_cores())
        self._weights = _PackedWeights(model)
        self._spans = _scratch_spans(model.plan.sources)
        self._bound: _Bound | None = None

    @property
    def weight_bytes(self) -> int:
        return self._weights.nbytes

    def prefill(self, tokens: Tensor, start: int, cache: StaticCache) -> Tensor:
        """As TorchRunner.prefill: logits [B, vocab_size] fp32 after the last of tokens [B, T]."""
        rows = []
        for row, ids in enumerate(tokens):
            *_, last = self._chunks(ids, start, cache, row, every=False)
            rows.append(last)
        return joined(rows)

    def all_logits(self, tokens: Tensor, start: int, cache: StaticCache) -> Iterator[Tensor]:
        """As TorchRunner.all_logits: logits [T', vocab_size] fp32, chunk by chunk, for tokens [1, T]."""
        return self._chunks(tokens[0], start, cache, 0, every=True)

    def decode(self, tokens: Tensor, positions: Tensor, cache: StaticCache, in_use: int) -> Tensor:
        """As TorchRunner.decode: logits [B, vocab_size] fp32."""
        return self._step(tokens, positions, torch.arange(len(tokens)), cache.view(in_use), len(tokens))

    def _chunks(self, ids: Tensor, start: int, cache: StaticCache, row: int, *, every: bool) -> Iterator[Tensor]:
        """Logits of each chunk: of every token, or of the whole's last token only."""
        stop = start + len(ids)
        while start < stop:
            end = min(start + self._chunk(start), stop)
            part, ids = ids[: end - start], ids[end - start :]
            n_logits = len(part) if every else int(end == stop)
            positions, rows = torch.arange(start, end), torch.full((len(part),), row)
            yield self._step(part, positions, rows, cache.view(end), n_logits)
            start = end

    def _chunk(self, start: int) -> int:
        """How many rows to feed at once from a position on."""
        config = self.model.config
        seen = min(start + CHUNK, config.sliding_window or start + CHUNK)
        row_bytes = 4 * seen * config.n_heads * (max(self._spans) + 1)
        return CHUNK if CHUNK * row_bytes <= SCRATCH else max(SCRATCH // row_bytes, 1)

    def _step(self, tokens: Tensor, positions: Tensor, rows: Tensor, cache: StaticCache, n_logits: int) -> Tensor:
        """Feed tokens [N] at positions [N] of the cache's rows [N]; logits [n_logits, vocab_size] of the last ones."""
        if self._bound is None or not self._bound.holds(cache):
            self._bound = _Bound(self, cache)
        config = self.model.config
        # What PyTorch would refuse by itself, C++ would do.
        if len(tokens) and not (int(tokens.min()) >= 0 and int(tokens.max()) < config.vocab_size):
            raise IndexError(f"a token is outside the vocabulary of {config.vocab_size}")
        if not (int(positions.min()) >= 0 and int(positions.max()) < cache.length):
            raise IndexError(f"a position is outside the {cache.length} slots of the cache")
        return self._bound.step(tokens, positions, rows + _first_row(cache), n_logits)


def _usable_cores() -> int:
    """Threads of a step wait for each other in a spin, so more of them than cores would stall."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _PackedWeights:
    """The model's weights as the C++ step takes them. The matrices leave the model as they are packed."""

    def __init__(self, model: Transformer) -> None:
        self.layers: list[dict[str, Any]] = []
        for layer in model.layers:
            assert isinstance(layer, Layer)
            attention, ffn = layer.attention, layer.feed_forward
            leads = hasattr(attention, "wq")
            self.layers.append(
                {
                    "attention_norm": layer.attention_norm.weight.float(),
                    "ffn_norm": layer.ffn_norm.weight.float(),
                    "wqkv": _pack(*([attention.wq, attention.wk] if leads else []), attention.wv),
                    "wo": _pack(attention.wo),
                    "w13": _pack(ffn.w1, ffn.w3, arrange=interleave),
                    "w2": _pack(ffn.w2),
                }
            )
            _return_freed_memory()
        self.embedding = _pack(model.tok_embeddings)
        self.head = self.embedding if model.output is None else _pack(model.output)
        self.final_norm = model.norm.weight.float()
        _return_freed_memory()

    @property
    def nbytes(self) -> int:
        matrices = [part for layer in self.layers for part in layer.values()] + [self.embedding, self.final_norm]
        if self.head is not self.embedding:
            matrices.append(self.head)
        return sum(part.data.nbytes for part in matrices)


def _return_freed_memory() -> None:
    """Give back what packed modules held: glibc would keep it, and the process would hold the weights twice."""
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)


def _stack(*matrices: Tensor) -> Tensor:
    return torch.cat(matrices)


def _pack(*modules: nn.Module, arrange: Callable[..., Tensor] = _stack) -> Packed:
    """The weights of modules as one packed matrix, its rows as `arrange` puts them; the modules lose theirs."""
    parts = [arrange(*pieces) for pieces in zip(*map(_take, modules), strict=True)]
    if len(parts) == 1:
        return pack_bf16(parts[0])
    return pack_int8(*parts) if len(parts) == 2 else pack_int4(*parts)


def _take(module: nn.Module) -> list[Tensor]:
    """A module's weight, or the parts of a quantized one, of which only empty tensors stay behind."""
    kept = dict(module.named_parameters()) | dict(module.named_buffers())
    parts = []
    for name, tensor in kept.items():
        parts.append(tensor.data)
        empty = tensor.data.new_empty(0)
        setattr(module, name, nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty)
    return parts


class _Bound:
    """The C++ engine with its tables set to one cache's memory."""

    def __init__(self, runner: NativeRunner, cache: StaticCache) -> None:
        model, weights = runner.model, runner._weights
        config, plan = model.config, model.plan
        self._library = runner.library
        self._storage = _storage(cache)
        keys_at, values_at, (per_layer, per_row, per_head, per_slot, _) = self._storage
        identity = tuple(range(config.n_heads))
        head_maps = [torch.tensor(heads or identity, dtype=torch.int32) for heads in plan.head_maps]
        layer_bytes = per_layer * cache.values.element_size()
        table = (_Layer * config.n_layers)()
        for i, layer in enumerate(weights.layers):
            index = cache.key_index[i]
            table[i] = _Layer(
                layer["attention_norm"].data_ptr(),
                layer["ffn_norm"].data_ptr(),
                *(_matrix(layer[name]) for name in ("wqkv", "wo", "w13", "w2")),
                None if index is None else keys_at + index * layer_bytes,
                values_at + i * layer_bytes,
                head_maps[i].data_ptr(),
                runner._spans[i],
            )
        self._model = _Model(
            dim=config.dim,
            n_layers=config.n_layers,
            n_heads=config.n_heads,
            n_kv_heads=config.n_kv_heads,
            head_dim=config.head_dim,
            hidden_dim=config.hidden_dim,
            vocab_size=config.vocab_size,
            cache_slots=per_head // per_slot,
            sliding_window=config.sliding_window or 0,
            n_spans=max(runner._spans) + 1,
            cache_format=CACHE_FORMATS[cache.values.dtype],
            norm_eps=config.norm_eps,
            embedding=_matrix(weights.embedding),
            head=_matrix(weights.head),
            final_norm=weights.final_norm.data_ptr(),
            layers=table,
        )
        self._angles = partial(rope_angles, model.rope_frequencies, factor=config.attention_factor)
        self._alive = (weights, cache.values, cache.keys, head_maps, table)  # what the tables point into
        max_rows = max(CHUNK, per_layer // per_row)
        self._process = os.getpid()
        self._engine = self._library.engine_open(ctypes.byref(self._model), runner.n_threads, max_rows)

    def holds(self, cache: StaticCache) -> bool:
        """Whether it is bound to this memory, and has its threads: after a fork they are the parent's."""
        return _storage(cache) == self._storage and self._process == os.getpid()

    def step(self, tokens: Tensor, positions: Tensor, rows: Tensor, n_logits: int) -> Tensor:
        logits = torch.empty(n_logits, self._model.vocab_size)
        inputs = [tensor.int().contiguous() for tensor in (tokens, positions, rows)]
        with one_torch_thread():  # from four rows on MKL would share the cosines out
            inputs += self._angles(positions[None])
        self._library.engine_step(
            self._engine, *(tensor.data_ptr() for tensor in inputs), len(tokens), n_logits, logits.data_ptr()
        )
        return logits

    def __del__(self) -> None:
        if hasattr(self, "_engine") and self._process == os.getpid():  # closing waits for the threads
            self._library.engine_close(self._engine)


def _storage(cache: StaticCache) -> tuple[int, int, tuple[int, ...]]:
    """Where the memory behind a cache or a view of it begins, keys and values, and the values' strides in elements."""
    keys, values = cache.keys.untyped_storage(), cache.values.untyped_storage()
    return keys.data_ptr(), values.data_ptr(), cache.values.stride()


def _first_row(cache: StaticCache) -> int:
    """The row of the memory behind it at which a view begins."""
    return cache.values.storage_offset() // cache.values.stride(1)


def _matrix(packed: Packed) -> _Matrix:
    return _Matrix(packed.data.data_ptr(), FORMATS[packed.format], packed.rows, packed.cols, 0)


def _scratch_spans(sources: Sequence[int]) -> list[int]:
    """For each layer the scratch that holds its span's attention weights, free again after the last follower; -1 for a
    layer that leads nobody."""
    last = {source: i for i, source in enumerate(sources)}
    spans: list[int] = []
    for i, source in enumerate(sources):
        if source != i:
            spans.append(spans[source])
        elif last[i] == i:
            spans.append(-1)
        else:
            busy = {spans[leader] for leader, end in last.items() if leader < i < end}
            spans.append(next(span for span in range(len(sources)) if span not in busy))
    return spans
