"""llama.cpp through its C API, as the xllamacpp or llama-cpp-python package brings it.

Their Python classes sample, detokenize and serve; here only the steps are wanted. Parameters are structs whose later
fields move from release to release. So each is taken from the library as opaque bytes, large enough for any release,
changed only in its first four fields, and what came of it is asked back.
Source: include/llama.h in https://github.com/ggml-org/llama.cpp
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import time
from collections.abc import Sequence
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int8, c_int32, c_uint32, c_uint64, c_void_p
from pathlib import Path
from typing import Any

import numpy as np

from minisa.benchmark.contender import LEAD_IN, Facts, Opening
from minisa.benchmark.gguf_writer import ggml_type
from minisa.device import peak_memory
from minisa.errors import MinisaError

CHUNK = 2048  # tokens a call; llama.cpp's own default of n_batch
KV_ITEMSIZE = 2  # its default cache is fp16
LOG_ERROR = 4  # GGML_LOG_LEVEL_ERROR


class _Params(ctypes.Structure):
    """llama_context_params or llama_model_params, and room to spare."""

    _fields_ = (
        ("n_ctx", c_uint32),
        ("n_batch", c_uint32),
        ("n_ubatch", c_uint32),
        ("n_seq_max", c_uint32),
        ("rest", c_uint64 * 126),
    )


class _Batch(ctypes.Structure):
    """llama_batch: n_tokens tokens, and for each its position, its one sequence and whether its logits are wanted."""

    _fields_ = (
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", POINTER(c_float)),
        ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))),
        ("logits", POINTER(c_int8)),
    )


_FUNCTIONS: dict[str, tuple[Any, ...]] = {  # result, arguments
    "llama_backend_init": (None,),
    "llama_log_set": (None, c_void_p, c_void_p),
    "llama_supports_gpu_offload": (c_bool,),
    "llama_model_default_params": (_Params,),
    "llama_context_default_params": (_Params,),
    "llama_model_load_from_file": (c_void_p, c_char_p, _Params),
    "llama_init_from_model": (c_void_p, c_void_p, _Params),
    "llama_model_size": (c_uint64, c_void_p),
    "llama_n_ctx": (c_uint32, c_void_p),
    "llama_n_batch": (c_uint32, c_void_p),
    "llama_n_seq_max": (c_uint32, c_void_p),
    "llama_set_n_threads": (None, c_void_p, c_int32, c_int32),
    "llama_get_memory": (c_void_p, c_void_p),
    "llama_memory_clear": (None, c_void_p, c_bool),
    "llama_memory_seq_rm": (c_bool, c_void_p, c_int32, c_int32, c_int32),
    "llama_decode": (c_int32, c_void_p, _Batch),
    "llama_synchronize": (None, c_void_p),
    "llama_get_logits": (POINTER(c_float), c_void_p),
}
_LOG_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_int, c_char_p, c_void_p)


class LlamaCpp:
    """A Contender."""

    def __init__(self, opening: Opening, gguf: Path) -> None:
        self._vocab_size = opening.config.vocab_size
        self._batch_size = opening.batch
        self._device = opening.device
        before = peak_memory(opening.device)
        began = time.perf_counter()
        self._lib, package = _library()
        errors: list[str] = []
        self._log = _LOG_CALLBACK(
            lambda level, text, data: errors.append(text.decode(errors="replace")) if level == LOG_ERROR else None
        )
        self._lib.llama_log_set(ctypes.cast(self._log, c_void_p), None)
        self._lib.llama_backend_init()
        if self._lib.llama_supports_gpu_offload():
            raise MinisaError(f"{package} computes on a GPU: install its CPU build to compare on the CPU")
        model = self._lib.llama_model_load_from_file(str(gguf).encode(), self._lib.llama_model_default_params())
        if not model:
            raise MinisaError(f"{package} could not load {gguf.name}: {' '.join(errors)}")
        self._context = self._open(model, opening, package)
        self._lib.llama_set_n_threads(self._context, opening.threads, opening.threads)
        self._memory = self._lib.llama_get_memory(self._context)
        self._facts = Facts(
            weight_bytes=self._lib.llama_model_size(model),
            memory_before=before,
            kv_itemsize=KV_ITEMSIZE,
            load_seconds=time.perf_counter() - began,
            detail=f"{package}, {ggml_type(opening)}, fp16 cache",
        )
        self._filled = 0

    def _open(self, model: int, opening: Opening, package: str) -> int:
        params = self._lib.llama_context_default_params()
        slots = -(-opening.context // 256) * 256 * opening.batch  # it rounds up by itself
        params.n_ctx, params.n_batch, params.n_seq_max = slots, min(CHUNK, slots), opening.batch
        context = self._lib.llama_init_from_model(model, params)
        if not context:
            raise MinisaError(f"{package} has no memory for {params.n_ctx} tokens: take smaller --contexts or --batch")
        asked = (params.n_ctx, params.n_batch, params.n_seq_max)
        given = tuple(getattr(self._lib, f"llama_{name}")(context) for name in ("n_ctx", "n_batch", "n_seq_max"))
        if given != asked:
            raise MinisaError(f"{package} made a context of {given} when asked for {asked}: try another version")
        return context

    def facts(self) -> Facts:
        return self._facts

    def prefill(self, tokens: list[int]) -> float:
        self._clear()
        began = time.perf_counter()
        self._feed(tokens, 0, row=0)
        return time.perf_counter() - began

    def fill(self, tokens: list[int]) -> None:
        for row in range(self._batch_size):
            self._feed(tokens[self._filled :], self._filled, row)
        self._filled = len(tokens)

    def decode(self, context: int, steps: int) -> list[float]:
        times = []
        chosen = [1] * self._batch_size
        rows = range(self._batch_size)
        for i in range(-LEAD_IN, steps):
            if i <= 0:
                self._rewind(context)
            batch = _Tokens(chosen, [context + max(i, 0)] * len(rows), rows, rows)
            began = time.perf_counter()
            logits = self._run(batch)
            times.append(time.perf_counter() - began)
            chosen = logits.argmax(-1).tolist()
        self._rewind(context)
        return times[LEAD_IN:]

    def greedy(self, tokens: list[int], new_tokens: int) -> list[int]:
        self._clear()
        chosen = [int(self._feed(tokens, 0, row=0).argmax())]
        while len(chosen) < new_tokens:
            chosen.append(int(self._feed(chosen[-1:], len(tokens) + len(chosen) - 1, row=0).argmax()))
        self._clear()
        return chosen

    def peak_memory(self) -> int:
        return peak_memory(self._device)

    def _feed(self, tokens: Sequence[int], start: int, row: int) -> np.ndarray:
        """Logits [1, vocab_size] after the last of tokens, which go to one row from position start on."""
        logits = np.empty(0)
        for begin in range(0, len(tokens), CHUNK):
            part = tokens[begin : begin + CHUNK]
            positions = range(start + begin, start + begin + len(part))
            logits = self._run(_Tokens(part, positions, [row] * len(part), [len(part) - 1]))
        return logits

    def _run(self, tokens: _Tokens) -> np.ndarray:
        """Logits [n_wanted, vocab_size], which last until the next call."""
        if status := self._lib.llama_decode(self._context, tokens.batch):
            raise MinisaError(f"llama.cpp's llama_decode failed with status {status}")
        self._lib.llama_synchronize(self._context)
        logits = self._lib.llama_get_logits(self._context)
        return np.ctypeslib.as_array(logits, (tokens.n_wanted, self._vocab_size))

    def _rewind(self, length: int) -> None:
        for row in range(self._batch_size):
            self._lib.llama_memory_seq_rm(self._memory, row, length, -1)

    def _clear(self) -> None:
        self._lib.llama_memory_clear(self._memory, True)
        self._filled = 0


class _Tokens:
    """A llama_batch and the arrays it points to."""

    def __init__(
        self, tokens: Sequence[int], positions: Sequence[int], rows: Sequence[int], wanted: Sequence[int]
    ) -> None:
        n = len(tokens)
        self.n_wanted = len(wanted)
        wants = [0] * n
        for i in wanted:
            wants[i] = 1
        self._rows = [(c_int32 * 1)(row) for row in rows]
        pointers = (POINTER(c_int32) * n)(*(ctypes.cast(row, POINTER(c_int32)) for row in self._rows))
        arrays = ((c_int32 * n)(*tokens), (c_int32 * n)(*positions), (c_int32 * n)(*[1] * n), pointers)
        token, pos, n_seq_id, seq_id = arrays
        self.batch = _Batch(n, token, None, pos, n_seq_id, seq_id, (c_int8 * n)(*wants))


def _library() -> tuple[Any, str]:
    """The C API, and the package and version it came with."""
    candidates = {"xllamacpp": ("xllamacpp*.so", "*.pyd"), "llama_cpp": ("lib/libllama.so", "lib/libllama.dylib")}
    for package, patterns in candidates.items():
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            continue
        folder = Path(spec.origin).parent
        for path in (path for pattern in patterns for path in sorted(folder.glob(pattern))):
            library = ctypes.CDLL(str(path))
            for name, (result, *arguments) in _FUNCTIONS.items():
                if not hasattr(library, name):
                    raise MinisaError(f"{package}: its library has no {name}: minisa needs another version of it")
                function = getattr(library, name)
                function.restype, function.argtypes = result, arguments
            distribution = package.replace("_cpp", "-cpp-python")
            return library, f"{distribution} {importlib.metadata.version(distribution)}"
    raise MinisaError('no llama.cpp here: pip install "minisa[peers]"')
