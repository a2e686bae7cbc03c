"""NativeRunner: the Runner interface over the C++ step."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import weakref
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from minisa.cache import StaticCache
from minisa.config import ModelConfig
from minisa.device import one_torch_thread
from minisa.generation.runner import Runner, joined
from minisa.model import Transformer
from minisa.rope import rope_angles
from minisa.runners.native.packing import LANES, PANEL, interleave, pack_bf16, pack_int4, pack_int8
from minisa.sharing import SharingPlan

CACHE_FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float8_e4m3fn: 2}  # as in tables.h
CHUNK = 64  # rows of prefill at a time, fewer where the attention weights of open spans would take more than SCRATCH
SCRATCH = 128 << 20  # bytes; a batch that needs more to decode gets more


class _Matrix(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), *((name, ctypes.c_int32) for name in ("format", "rows", "cols", "reserved"))]


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("attention_norm", "ffn_norm")),
        *((name, _Matrix) for name in ("wqkv", "wo", "w13", "w2")),
        *((name, ctypes.c_void_p) for name in ("keys", "values", "head_map")),
        *((name, ctypes.c_int32) for name in ("span", "reserved")),
    ]


_SIZES = ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim", "vocab_size")  # as ModelConfig has them


class _Model(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in (*_SIZES, "cache_slots", "sliding_window", "n_spans", "cache_format")),
        ("norm_eps", ctypes.c_float),
        *((name, _Matrix) for name in ("embedding", "head")),
        ("final_norm", ctypes.c_void_p),
        ("layers", ctypes.POINTER(_Layer)),
    ]


def supports(config: ModelConfig) -> bool:
    """Whether the model's widths fill whole panels and vectors."""
    widths = (config.dim, config.hidden_dim, config.n_heads * config.head_dim)
    return all(width % PANEL == 0 for width in widths) and config.head_dim % (2 * LANES) == 0


class NativeRunner(Runner):
    """Runs a model in the C++ step. Its matrices, bf16 or quantized, move out of `model` and into panels, one by one.

    The caches it is given are fp32, bf16 or fp8, on the CPU. Before each product activations are rounded to bf16, or
    for quantized weights to eight bits and a scale for every 32; sums and attention are fp32, and so are the logits. A
    token's logits are the same to the bit whatever rows it is fed with and however many threads there are.
    """

    asynchronous = False
    fixed_batch = False
    name = "C++ step"

    def __init__(self, model: Transformer, library: ctypes.CDLL, n_threads: int | None = None) -> None:
        self.model = model
        self.n_threads = n_threads or min(torch.get_num_threads(), _usable_cores())
        self._library = library
        self._tables = _Tables(model)
        self._storage: object = None  # the memory of the cache that the engine is open for
        self._engine = 0
        self._close: Callable[[], object] = lambda: None

    @property
    def weight_bytes(self) -> int:
        return sum(weight.nbytes for weight in self._tables.weights)

    def prefill(self, tokens: Tensor, start: int, cache: StaticCache) -> Tensor:
        rows = []
        for row, ids in enumerate(tokens):
            *_, last = self._chunks(ids, start, cache, row, every=False)
            rows.append(last)
        return joined(rows)

    def all_logits(self, tokens: Tensor, start: int, cache: StaticCache) -> Iterator[Tensor]:
        return self._chunks(tokens[0], start, cache, 0, every=True)

    def decode(self, tokens: Tensor, positions: Tensor, cache: StaticCache, in_use: int) -> Tensor:
        return self._step(tokens, positions, torch.arange(len(tokens)), cache.view(in_use), len(tokens))

    def _chunks(self, ids: Tensor, start: int, cache: StaticCache, row: int, *, every: bool) -> Iterator[Tensor]:
        """Logits of each chunk: of every token, or of the last one of all only."""
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
        row_bytes = 4 * seen * config.n_heads * self._tables.model.n_spans
        return CHUNK if CHUNK * row_bytes <= SCRATCH else max(SCRATCH // row_bytes, 1)

    def _step(self, tokens: Tensor, positions: Tensor, rows: Tensor, cache: StaticCache, n_logits: int) -> Tensor:
        """Feed tokens [N] at positions [N] of the cache's rows [N]; logits [n_logits, vocab_size] of the last ones."""
        if self._storage != _storage(cache):
            self._open(cache)
        config = self.model.config
        # C++ checks no bounds.
        if len(tokens) and not (int(tokens.min()) >= 0 and int(tokens.max()) < config.vocab_size):
            raise IndexError(f"a token is outside the vocabulary of {config.vocab_size}")
        if not (int(positions.min()) >= 0 and int(positions.max()) < cache.length):
            raise IndexError(f"a position is outside the {cache.length} slots of the cache")
        first_row = cache.values.storage_offset() // cache.values.stride(1)  # of a view, in the memory behind it
        inputs = [tensor.int().contiguous() for tensor in (tokens, positions, rows + first_row)]
        with one_torch_thread():  # cosines of four rows or more would wake the others
            inputs += rope_angles(self.model.rope_frequencies, positions[None], config.attention_factor)
        logits = torch.empty(n_logits, config.vocab_size)
        self._library.engine_step(
            self._engine, *(tensor.data_ptr() for tensor in inputs), len(tokens), n_logits, logits.data_ptr()
        )
        return logits

    def _open(self, cache: StaticCache) -> None:
        """Open the engine for the memory behind a cache, in place of the one before."""
        self._storage = None
        self._close()
        self._tables.point_to(cache)
        layer_stride, row_stride, *_ = cache.values.stride()
        max_rows = max(CHUNK, layer_stride // row_stride)
        self._engine = self._library.engine_open(ctypes.byref(self._tables.model), self.n_threads, max_rows)
        closing = weakref.finalize(self, self._library.engine_close, self._engine)
        closing.atexit = False  # the process takes its threads with it
        self._close = closing
        self._storage = _storage(cache)  # last: Ctrl-C may come in between


def _usable_cores() -> int:
    """The threads of a step spin while they wait for each other: more of them than cores would stall."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Tables:
    """What the C++ step reads, as in tables.h. The matrices are packed one by one and leave the model."""

    def __init__(self, model: Transformer) -> None:
        config, spans = model.config, _scratch_spans(model.plan)
        self.weights: list[Tensor] = []  # what the tables point to
        self._head_maps = [
            torch.tensor(heads or range(config.n_heads), dtype=torch.int32) for heads in model.plan.head_maps
        ]
        self._layers = (_Layer * config.n_layers)()
        for i, layer in enumerate(model.layers):
            attention: Any = layer.attention
            feed_forward: Any = layer.feed_forward
            queries_and_keys = (attention.wq, attention.wk) if hasattr(attention, "wq") else ()
            self._layers[i] = _Layer(
                attention_norm=self._norm(layer.attention_norm),
                ffn_norm=self._norm(layer.ffn_norm),
                wqkv=self._matrix(*queries_and_keys, attention.wv),
                wo=self._matrix(attention.wo),
                w13=self._matrix(feed_forward.w1, feed_forward.w3, arrange=interleave),
                w2=self._matrix(feed_forward.w2),
                head_map=self._head_maps[i].data_ptr(),
                span=spans[i],
            )
            _return_freed_memory()
        embedding = self._matrix(model.tok_embeddings)
        self.model = _Model(
            **{name: getattr(config, name) for name in _SIZES},
            sliding_window=config.sliding_window or 0,
            n_spans=max(spans) + 1,
            norm_eps=config.norm_eps,
            embedding=embedding,
            head=embedding if model.output is None else self._matrix(model.output),
            final_norm=self._norm(model.norm),
            layers=self._layers,
        )
        _return_freed_memory()

    def point_to(self, cache: StaticCache) -> None:
        """Fill in where a cache's keys and values lie."""
        keys_at, values_at, strides = _storage(cache)
        layer_bytes = strides[0] * cache.values.element_size()
        for i, (layer, index) in enumerate(zip(self._layers, cache.key_index, strict=True)):
            layer.keys = None if index is None else keys_at + index * layer_bytes
            layer.values = values_at + i * layer_bytes
        self.model.cache_slots = strides[2] // strides[3]
        self.model.cache_format = CACHE_FORMATS[cache.values.dtype]
        self._cache = cache  # the memory lives as long as it is pointed to

    def _norm(self, norm: Any) -> int:
        self.weights.append(norm.weight.float())
        return self.weights[-1].data_ptr()

    def _matrix(self, *modules: nn.Module, arrange: Callable[..., Tensor] | None = None) -> _Matrix:
        """The weights of modules as one packed matrix, its rows as `arrange` puts them; the modules lose theirs."""
        taken = zip(*map(_take, modules), strict=True)
        parts = [arrange(*rows) if arrange else joined(rows) for rows in taken]
        del taken  # or the weights as they were would still be there while they are packed
        format, (rows, cols) = len(parts) - 1, parts[0].shape  # in tables.h: 0 for bf16, 1 for int8, 2 for int4
        self.weights.append((pack_bf16, pack_int8, pack_int4)[format](*parts))
        return _Matrix(self.weights[-1].data_ptr(), format, rows, cols)


def _take(module: nn.Module) -> list[Tensor]:
    """A module's weight, or the parts of a quantized one; empty tensors stay behind."""
    held = [*module.parameters(), *module.buffers()]
    parts = [tensor.data for tensor in held]
    for tensor in held:
        tensor.data = tensor.data.new_empty(0)
    return parts


def _return_freed_memory() -> None:
    """Return to the system what packed modules held. glibc would keep it: the process would hold the weights twice."""
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)


def _storage(cache: StaticCache) -> tuple[int, int, tuple[int, ...]]:
    """Where the memory behind a cache or a view of it begins, keys and values, and the values' strides in elements."""
    keys, values = cache.keys.untyped_storage(), cache.values.untyped_storage()
    return keys.data_ptr(), values.data_ptr(), cache.values.stride()


def _scratch_spans(plan: SharingPlan) -> list[int]:
    """For each layer the place in scratch of its span's attention weights, free again after the last follower; -1 for a
    layer that leads nobody."""
    places = [-1] * plan.n_layers
    for leader, followers in sorted(plan.spans.items()):
        taken = {places[other] for other, theirs in plan.spans.items() if other < leader < theirs[-1]}
        place = next(i for i in count() if i not in taken)
        for layer in (leader, *followers):
            places[layer] = place
    return places
