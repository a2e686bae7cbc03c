"""load() and LLM: a model, its tokenizer, its cache and its plan in one place."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property, partial
from numbers import Integral
from pathlib import Path
from typing import Any, Unpack
from weakref import WeakSet

import torch
from torch import Tensor

from minisa.attention import fastest_backend
from minisa.cache import StaticCache
from minisa.checkpoint import load_weights, open_checkpoint, with_delta
from minisa.config import ModelConfig
from minisa.costs import cache_slots, kv_bytes
from minisa.device import (
    choose_device,
    choose_dtype,
    choose_kv_dtype,
    dtype_name,
    free_memory,
    keep_forks_running,
    runs_kernels,
)
from minisa.errors import MinisaError, shown
from minisa.generation.batch import Batch
from minisa.generation.generate import compute_prefix, generate
from minisa.generation.lease import Lease, Leases
from minisa.generation.loop import DecodingLoop
from minisa.generation.prompts import Prompt, as_ids, as_list, check_names, is_dialog
from minisa.generation.row import Chunk, GenerationOptions, Options, Prefix, common_prefix
from minisa.generation.sampling import Sampling, SamplingOptions, check_number
from minisa.interrupts import uninterrupted
from minisa.model import Transformer
from minisa.models.registry import choose_plan, resolve
from minisa.quantize import check_quantization
from minisa.runners.choice import choose_runner, may_become_native, native_step
from minisa.sharing import SharingPlan
from minisa.text.chat import ChatTemplate, Message, find_template, read_format
from minisa.text.tokenizer import Tokenizer, check_ids, load_tokenizer


def load(
    model: str | Path,
    sa: str | Path | SharingPlan | None = None,
    device: str = "auto",
    dtype: str = "auto",
    max_seq_len: int | None = None,
    max_batch: int = 1,
    *,
    quantize: str | None = None,
    kv_dtype: str = "auto",
    compile: bool | None = None,
    backend: str | None = None,
    chat_format: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> LLM:
    """A model ready to run.

    model: a name from weights/models.toml whose files are there, or the path of a checkpoint (a directory in Hugging
        Face's, Meta's or Mistral's layout, or a .gguf file).
    sa: None for plain attention, spans such as "27-30", "default" for the model's own plan, a SharingPlan, or the
        path of a plan's JSON file.
    device: auto, cpu, cuda, cuda:N, mps. dtype: auto, fp32, bf16, fp16.
    max_seq_len: tokens that a row of the cache is for; None takes the context the model was trained for, or what fits
        in half of the free memory if that is less. With a sliding window their slots are a ring, and more are free.
        RoPE that is stretched linearly allows the stretch's factor times the context that the checkpoint states.
    max_batch: rows of the cache.
    quantize: None, "int8" or "int4": the matrices' format, as in quantize.py.
    kv_dtype: what keys and values are kept in: auto for the weights' dtype, fp32, bf16, fp16, or fp8 (e4m3).
    compile: True, False or None for what is ready now, as in `choose_runner`.
    backend: None for the fastest attention there is for the device, "torch", "kernels" (Triton's, on CUDA), or
        "reference" for attention written out, which runs eager.
    chat_format: one of FORMATS in text/chat.py, or the path of a .jinja file, in place of the checkpoint's own chat
        template; None for that one.
    progress: called with (bytes done, bytes in all) while weights load.
    Raises MinisaError for whatever the caller can put right.
    """
    path, entry = resolve(str(model))
    target = choose_device(device)
    checkpoint = open_checkpoint(path)
    config = checkpoint.config
    plan = choose_plan(sa, config, entry)
    if plan.delta is not None:
        checkpoint = with_delta(checkpoint, plan.delta)
    check_number("max_batch", max_batch, 1, math.inf, "1 or more", Integral)
    limit = config.longest_seq_len
    if max_seq_len is not None:
        check_number("max_seq_len", max_seq_len, 1, limit, f"1 to {limit}, the longest that the model allows", Integral)
        max_seq_len = int(max_seq_len)  # numpy's would be multiplied in so many bits
    max_batch = int(max_batch)
    if backend == "kernels" and not runs_kernels(target):
        raise MinisaError(f"backend 'kernels' is for CUDA, the device is {target}: leave it out, or take 'torch'")
    if chat_format is not None:
        read_format(chat_format)  # what is wrong with it is told before the weights load
    tokenizer = load_tokenizer(path)
    with torch.device("meta"):
        transformer = Transformer(config, plan, backend or fastest_backend(target))
    compile = False if backend == "reference" else compile
    weight_format = check_quantization(quantize)
    native = native_step(config, target, compile=compile, quantized=weight_format is not None) is not None
    number_format = choose_dtype(dtype, target, native=native)
    kv_format = choose_kv_dtype(kv_dtype, number_format)
    load_weights(transformer, checkpoint, device=target, dtype=number_format, quantize=weight_format, progress=progress)
    transformer.to(target)  # the buffers; the weights are there already
    length = max_seq_len or _affordable_length(config, plan, max_batch, kv_format, target)
    cache = StaticCache.allocate(config, plan, batch=max_batch, max_seq_len=length, device=target, dtype=kv_format)

    def template() -> ChatTemplate:
        return find_template(path, tokenizer, chat_format, entry.chat if entry is not None else None)

    return LLM(transformer, tokenizer, template, cache, compile=compile, quantized=weight_format)


def _affordable_length(
    config: ModelConfig, plan: SharingPlan, batch: int, dtype: torch.dtype, device: torch.device
) -> int:
    per_slot = kv_bytes(config, plan, 1, dtype.itemsize, batch)
    affordable = free_memory(device) // 2 // per_slot
    if affordable >= cache_slots(config, config.max_seq_len):
        return config.max_seq_len
    return min(max(256, affordable // 256 * 256), config.max_seq_len)


class LLM:
    """A loaded model. One generation at a time: starting the next one ends the one before, in whatever thread.

    It goes on in a forked process too, where PyTorch then has one thread (keep_forks_running in device.py).
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        find_template: Callable[[], ChatTemplate],
        cache: StaticCache,
        *,
        compile: bool | None = None,
        quantized: str | None = None,
    ) -> None:
        keep_forks_running()
        self.model = model
        self.tokenizer = tokenizer
        self._find_template = find_template
        self.cache = cache
        self.runner = choose_runner(model, compile)
        self._compile = compile
        self.weight_format = quantized or dtype_name(self.dtype)
        self._held: list[int] = []  # the tokens whose keys and values row 0 of the cache holds
        self._prefixes: WeakSet[Prefix] = WeakSet()
        self._leases = Leases()

    @cached_property
    def chat_template(self) -> ChatTemplate:
        """How messages become a prompt. Raises MinisaError where that fails: such a model can still `generate`."""
        return self._find_template()

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    @property
    def plan(self) -> SharingPlan:
        return self.model.plan

    @property
    def device(self) -> torch.device:
        return self.cache.values.device

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in; `llm.cache.values.dtype` is what keys and values are kept in."""
        return self.model.norm.weight.dtype

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights as they are stored."""
        return self.runner.weight_bytes

    def logits(self, token_ids: Sequence[int]) -> Tensor:
        """Logits [T, vocab_size] fp32 at every one of T tokens, on the model's device. llm.cache is not touched.

        Raises MinisaError where T goes beyond the model's own context, and for ids outside the vocabulary.
        """
        ids = as_ids(token_ids, "token_ids")
        check_ids(ids, self.config.vocab_size, "token_ids")
        if len(ids) > (limit := self.config.longest_seq_len):
            raise MinisaError(f"token_ids: {len(ids)} of them, the model's context is {limit}: expected no more")
        tokens, cache = torch.tensor([ids], device=self.device), self._cache_for(ids)
        with self._leases.alone, torch.inference_mode():
            parts = [logits.float() for logits in self.runner.all_logits(tokens, 0, cache)]
        return torch.cat(parts)  # out here, so that the caller may change it

    def prefix(self, beginning: Prompt | Sequence[Message]) -> Prefix:
        """A beginning that prompts share, computed once: keys and values for `prefix=` of `generate` and `chat`.

        beginning: text, token ids, or the messages that dialogs begin with, a system prompt for example. It takes
        memory of its own, `costs.kv_bytes` of so many tokens, and leaves llm.cache alone.
        Raises MinisaError as `generate` does.
        """
        if is_dialog(beginning):
            # What two dialogs have in common that part there.
            one, other = (
                self.chat_template.ids([*beginning, {"role": "user", "content": text}]) for text in ("a", "b")
            )
            beginning = one[: common_prefix(one, other)]
        ids = self._prompt_ids(beginning)  # type: ignore[arg-type]
        with self._leases.alone:
            found = compute_prefix(self.runner, self._cache_for(ids), ids)
        self._prefixes.add(found)
        return found

    def _cache_for(self, ids: list[int]) -> StaticCache:
        """One row, for these tokens."""
        return StaticCache.allocate(
            self.config, self.plan, max_seq_len=len(ids), device=self.device, dtype=self.cache.values.dtype
        )

    def generate(self, prompts: Prompt | Sequence[Prompt], **options: Unpack[GenerationOptions]) -> Iterator[Chunk]:
        """Continue one prompt or several at once, streaming.

        prompts: text, token ids, or a list of either (at most max_batch). Text gets the BOS token where the model's
            maker puts it; special tokens spelled in it are plain text.
        options: max_new_tokens, stop (a string or several), stop_ids (the model's own by default) and speculate, as in
            `Options`; temperature, top_k, top_p, min_p, repetition_penalty and seed, as in `Sampling`; prefix, from
            `prefix`: what a prompt has in common with it is not computed again.
        Raises MinisaError for an empty or too long prompt or an option out of range, before anything is computed; on
        the way once another generation has begun on the model, after an interrupted step, and for logits that are no
        numbers.
        """
        check_names(options, GenerationOptions, "generate")
        return self._start([self._prompt_ids(prompt) for prompt in as_list(prompts)], mid_text=True, **options)

    def chat(self, messages: Sequence[Message], **options: Unpack[GenerationOptions]) -> Iterator[Chunk]:
        """Answer the last of messages, [{"role": "user", "content": ...}, ...]; options as in `generate`.

        What the dialog has in common with the cache, usually everything but the last message, is not computed again.
        Raises MinisaError as `generate` does, for messages that the chat format has no place for, and where it is not
        known.
        """
        check_names(options, GenerationOptions, "chat")
        if options.get("stop_ids") is None:
            options["stop_ids"] = self.chat_template.stop_ids
        return self._start([self._prompt_ids(self.chat_template.ids(messages))], mid_text=False, **options)

    def batch(self, **sampling: Unpack[SamplingOptions]) -> Batch:
        """Rows, max_batch of them, that prompts can be added to and cancelled from while others are continued.

        sampling: temperature, top_k, top_p, min_p and repetition_penalty, as in `Sampling`, for every row.
        Like the start of a generation it ends the one before.
        Raises MinisaError for an option out of range.
        """
        if "seed" in sampling:
            raise MinisaError("batch: seed is each prompt's own: leave it to add")
        check_names(sampling, SamplingOptions, "batch")
        same = Sampling(**sampling)
        lease = self._begin()
        with lease():
            self._held.clear()
        loop = DecodingLoop(self.runner, self.cache, self.tokenizer, same, self.cache.batch)
        return Batch(loop, partial(self._request, same), lease, self._leases.alone)

    def _request(
        self, sampling: Sampling, prompt: Prompt | Sequence[Message], *, seed: int | None, **options: Any
    ) -> tuple[list[int], Options]:
        """What Batch.add is given, as token ids and options."""
        dialog = is_dialog(prompt)
        if dialog:
            prompt = self.chat_template.ids(prompt)  # type: ignore[arg-type]
            if options["stop_ids"] is None:
                options["stop_ids"] = self.chat_template.stop_ids
        ids = self._prompt_ids(prompt)  # type: ignore[arg-type]
        sampling = replace(sampling, seed=seed)
        sampling.seeds(1)  # as in _start
        return ids, self._options(sampling, mid_text=not dialog, **options)

    def _options(
        self, sampling: Sampling, stop: str | Sequence[str], stop_ids: Iterable[int] | None, prefix: Prefix | None,
        **others: Any,
    ) -> Options:  # fmt: skip
        if prefix is not None and prefix not in self._prefixes:
            raise MinisaError("generate: prefix is another model's: make it by this one's llm.prefix")
        if isinstance(stop, str):
            stop = (stop,)
        if not isinstance(stop, Iterable):
            raise MinisaError(f"stop is {shown(stop)}: expected a string, or several")
        ids = self.tokenizer.eos_ids if stop_ids is None else frozenset(as_ids(stop_ids, "stop_ids", ordered=False))
        return Options(sampling, stop=tuple(stop), stop_ids=ids, **others)

    def _start(
        self,
        rows: list[list[int]],
        *,
        mid_text: bool,
        max_new_tokens: int | None = None,
        stop: str | Sequence[str] = (),
        stop_ids: Iterable[int] | None = None,
        prefix: Prefix | None = None,
        speculate: bool = False,
        **sampling: Unpack[SamplingOptions],
    ) -> Iterator[Chunk]:
        if not rows:
            raise MinisaError("generate: no prompt; give text or token ids")
        if len(rows) > self.cache.batch:
            raise MinisaError(f"generate: {len(rows)} prompts for max_batch {self.cache.batch}: load with a larger one")
        if speculate and len(rows) > 1:
            raise MinisaError(f"generate: speculate is for one prompt, {len(rows)} are given: leave it out")
        how = {"max_new_tokens": max_new_tokens, "mid_text": mid_text, "speculate": speculate}
        options = self._options(Sampling(**sampling), stop, stop_ids, prefix, **how)
        options.sampling.seeds(len(rows))  # a wrong number of them is an error of this call, not of the first next
        return self._stream(rows, options, prefix)

    def _stream(self, rows: list[list[int]], options: Options, prefix: Prefix | None) -> Iterator[Chunk]:
        lease = self._begin()
        held = self._held if len(rows) == 1 else None
        if held is None:
            with lease():
                self._held.clear()
        chunks = generate(self.runner, self.cache, self.tokenizer, rows, options, held, prefix)
        while True:
            with lease():
                chunk = next(chunks, None)
            if chunk is None:
                return
            yield chunk

    def _begin(self) -> Lease:
        """Take the cache for a generation, with the fastest runner by now."""
        with self._leases.alone:
            if may_become_native(self.runner, self._compile):
                with uninterrupted():  # half of the weights packed would leave no model
                    self.runner = choose_runner(self.model, self._compile)
                    if not may_become_native(self.runner, self._compile):  # any more: it rounds otherwise than PyTorch
                        self._held.clear()
                        for prefix in self._prefixes:
                            compute_prefix(self.runner, prefix.cache, prefix.tokens)
            return self._leases.begin()

    def _prompt_ids(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str) and not prompt:
            raise MinisaError("the prompt is empty: give some text")
        ids = self._encode(prompt) if isinstance(prompt, str) else as_ids(prompt, "the prompt")
        check_ids(ids, self.config.vocab_size, "the prompt")
        if len(ids) > self.cache.length:
            raise MinisaError(
                f"the prompt is {len(ids)} tokens long, the context {self.cache.length}: "
                "shorten it or raise max_seq_len"
            )
        return ids

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.bos_ids + self.tokenizer.encode(text)
