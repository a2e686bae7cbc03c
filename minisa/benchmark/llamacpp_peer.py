"""llama.cpp through its C API, which the xllamacpp package brings.

That package's Python classes sample and serve; here only the steps are wanted. The later fields of parameter structs
move from release to release, so a struct is taken from the library as opaque bytes, large enough for any release, and
only its first four fields are changed.
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
import torch

from minisa.benchmark.contender import LEAD_IN, Contender, Facts, Opening
from minisa.benchmark.gguf_writer import ggml_type
from minisa.device import peak_memory
from minisa.errors import MinisaError

CHUNK = 2048  # tokens a call; llama.cpp's own default of n_batch
CPU = torch.device("cpu")


class _Params(ctypes.Structure):
    """llama_context_params or llama_model_params, and room to spare."""

    _fields_ = (*((name, c_uint32) for name in ("n_ctx", "n_batch", "n_ubatch", "n_seq_max")), ("rest", c_uint64 * 126))


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
    "llama_set_n_threads": (None, c_void_p, c_int32, c_int32),
    "llama_get_memory": (c_void_p, c_void_p),
    "llama_memory_seq_rm": (c_bool, c_void_p, c_int32, c_int32, c_int32),
    "llama_batch_init": (_Batch, c_int32, c_int32, c_int32),
    "llama_decode": (c_int32, c_void_p, _Batch),
    "llama_synchronize": (None, c_void_p),
    "llama_get_logits": (POINTER(c_float), c_void_p),
}
_SILENT = ctypes.CFUNCTYPE(None, ctypes.c_int, c_char_p, c_void_p)(lambda level, text, data: None)


class LlamaCpp(Contender):
    """llama.cpp on the CPU, on minisa's weights written as a GGUF file for this run."""

    def __init__(self, opening: Opening, file: Path) -> None:
        """file: the weights, from `write_gguf`."""
        self._opening, self._lib = opening, _library()
        self._memory_before = peak_memory(CPU)
        began = time.perf_counter()
        self._lib.llama_log_set(ctypes.cast(_SILENT, c_void_p), None)
        self._lib.llama_backend_init()
        if self._lib.llama_supports_gpu_offload():
            raise MinisaError("xllamacpp computes on a GPU: install its CPU build")
        model = self._lib.llama_model_load_from_file(str(file).encode(), self._lib.llama_model_default_params())
        if not model:
            raise MinisaError(f"could not load the weights as {ggml_type(opening)}")
        params = self._lib.llama_context_default_params()
        params.n_ctx = -(-opening.context // 256) * 256 * opening.batch  # it rounds up by itself
        params.n_batch, params.n_seq_max = min(CHUNK, params.n_ctx), opening.batch
        self._context = self._lib.llama_init_from_model(model, params)
        if not self._context or self._lib.llama_n_ctx(self._context) != params.n_ctx:
            raise MinisaError(f"made no context of {params.n_ctx} tokens: take smaller --contexts or --batch")
        self._lib.llama_set_n_threads(self._context, opening.threads, opening.threads)
        self._memory = self._lib.llama_get_memory(self._context)
        self._batch = self._lib.llama_batch_init(max(CHUNK, opening.batch), 0, 1)
        self._load_seconds = time.perf_counter() - began
        self._weight_bytes = self._lib.llama_model_size(model)

    def facts(self) -> Facts:
        version = importlib.metadata.version("xllamacpp")
        return Facts(
            weight_bytes=self._weight_bytes,
            dtype=torch.float32,
            kv_dtype=torch.float16,  # the default
            memory_before=self._memory_before,
            peak_memory=peak_memory(CPU),
            load_seconds=self._load_seconds,
            detail=f"xllamacpp {version}, {ggml_type(self._opening)}, fp16 cache",
        )

    def feed(self, tokens: Sequence[int], start: int, row: int = 0) -> int:
        self._rewind(row, start)
        for begin in range(0, len(tokens), CHUNK):
            part = tokens[begin : begin + CHUNK]
            (chosen,) = self._run([(token, start + begin + i, row) for i, token in enumerate(part)], wanted=1)
        return chosen

    def decode(self, context: int, steps: int) -> list[float]:
        times: list[float] = []
        rows = range(self._opening.batch)
        chosen = [1] * len(rows)
        for i in range(-LEAD_IN, steps):
            if i <= 0:
                for row in rows:
                    self._rewind(row, context)
            began = time.perf_counter()
            chosen = self._run([(chosen[row], context + max(i, 0), row) for row in rows], wanted=len(rows))
            times.append(time.perf_counter() - began)
        return times[LEAD_IN:]

    def _run(self, tokens: Sequence[tuple[int, int, int]], wanted: int) -> list[int]:
        """Feed (token, position, row) each; the greedy next tokens after the last `wanted` of them."""
        batch = self._batch
        batch.n_tokens = len(tokens)
        for i, (token, position, row) in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, position, 1, row
            batch.logits[i] = i >= len(tokens) - wanted
        if status := self._lib.llama_decode(self._context, batch):
            raise MinisaError(f"llama_decode failed with status {status}")
        self._lib.llama_synchronize(self._context)
        logits = self._lib.llama_get_logits(self._context)
        return np.ctypeslib.as_array(logits, (wanted, self._opening.config.vocab_size)).argmax(-1).tolist()

    def _rewind(self, row: int, length: int) -> None:
        self._lib.llama_memory_seq_rm(self._memory, row, length, -1)


def _library() -> Any:
    """The C API."""
    spec = importlib.util.find_spec("xllamacpp")
    assert spec is not None and spec.origin is not None  # settings.py has seen it
    path = next(file for file in Path(spec.origin).parent.iterdir() if file.suffix in (".so", ".pyd"))
    library = ctypes.CDLL(str(path))
    for name, (result, *arguments) in _FUNCTIONS.items():
        if not hasattr(library, name):
            raise MinisaError(f"this version of xllamacpp has no {name}: install another")
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library
