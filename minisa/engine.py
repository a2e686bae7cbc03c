"""load() and LLM: a model, its tokenizer, its cache and its plan in one place."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minisa.cache import StaticCache, common_prefix
from minisa.checkpoint import Checkpoint, load_weights, open_checkpoint, with_delta
from minisa.config import ModelConfig
from minisa.costs import cache_slots, kv_bytes
from minisa.device import choose_device, choose_dtype, choose_kv_dtype, dtype_name, free_memory
from minisa.errors import MinisaError
from minisa.generation.batch import Batch, PreparedRow, Prompt
from minisa.generation.loop import DecodingLoop
from minisa.generation.options import Options, Sampling
from minisa.generation.row import Chunk, Prefix
from minisa.generation.runner import Runner
from minisa.model import Transformer
from minisa.models.registry import choose_plan, resolve
from minisa.quantize import check_quantization
from minisa.runners.choice import choose_runner, find_backend, native_library
from minisa.sharing import SharingPlan
from minisa.text.chat import ChatTemplate, Message, find_template, read_format
from minisa.text.tokenizer import NoTokenizer, Tokenizer, load_tokenizer


def load(
    model: str | Path | Checkpoint,
    sa: str | Path | SharingPlan | None = None,
    device: str = "auto",
    dtype: str | torch.dtype = "auto",
    max_seq_len: int | None = None,
    max_batch: int = 1,
    *,
    quantize: str | None = None,
    kv_dtype: str | torch.dtype = "auto",
    compile: bool | None = None,
    backend: str | None = None,
    chat_format: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> LLM:
    """A model ready to run.

    model: a name from weights/models.toml whose files are there, or the path of a checkpoint (a directory in Hugging
        Face's, Meta's or Mistral's layout, or a .gguf file), or a Checkpoint, already open.
    sa: None for plain attention, spans such as "27-30", "default" for the model's own plan, a SharingPlan, or the
        path of a plan's JSON file.
    device: auto, cpu, cuda, cuda:N, mps. dtype: auto, fp32, bf16, fp16, or torch's own names.
    max_seq_len: tokens that a row of the cache is for; None takes the context the model was trained for, or what fits
        in half of the free memory if that is less. With a sliding window their slots are a ring, and more are free.
        RoPE that is stretched linearly allows the stretch's factor times the context that the checkpoint states.
    max_batch: rows of the cache.
    quantize: None, "int8" or "int4": the matrices' format, as in quantize.py.
    kv_dtype: what keys and values are kept in: auto for the weights' dtype, fp32, bf16, fp16, or fp8 (e4m3).
    compile: None, True or False, as in `choose_runner`; the C++ step is built first if need be, in some seconds.
    backend: None for the fastest attention there is for the device, "torch", "kernels" (Triton's, on CUDA), or
        "reference" for attention written out, which runs eager.
    chat_format: a name in text/formats or a .jinja file, for a checkpoint that comes without a chat template, or in
        place of its own.
    progress: called with (bytes done, bytes in all) while weights load.
    Raises MinisaError for whatever the caller can put right.
    """
    if isinstance(model, Checkpoint):
        checkpoint, path, entry = model, model.path, None
    else:
        path, entry = resolve(str(model))
        checkpoint = open_checkpoint(path)
    config, target = checkpoint.config, choose_device(device)
    plan = choose_plan(sa, config, entry)
    if plan.delta is not None:
        checkpoint = with_delta(checkpoint, plan.delta)
    tokenizer = load_tokenizer(path) if path.exists() else NoTokenizer(path)  # of random weights
    template = partial(find_template, path, tokenizer, chat_format, None if entry is None else entry.chat)
    if chat_format is not None:
        read_format(chat_format)  # what is wrong with it is told before the weights load
    limit = config.longest_seq_len
    if max_seq_len is not None and not 1 <= max_seq_len <= limit:
        raise MinisaError(f"max_seq_len is {max_seq_len}: expected 1 to {limit}, the longest that the model allows")
    if max_batch < 1:
        raise MinisaError(f"max_batch is {max_batch}: expected 1 or more")
    with torch.device("meta"):
        transformer = Transformer(config, plan, find_backend(backend, target))
    compile = False if backend == "reference" else compile
    weight_format = check_quantization(quantize)
    library = native_library(config, target, compile, dtype)
    number_format = choose_dtype(dtype, target, native=library is not None)
    kv_format = choose_kv_dtype(kv_dtype, number_format)
    load_weights(transformer, checkpoint, device=target, dtype=number_format, quantize=weight_format, progress=progress)
    transformer.to(target)  # the buffers; the weights are there already
    runner = choose_runner(transformer, compile, library)
    length = max_seq_len or _affordable_length(config, plan, max_batch, kv_format, target)
    cache = StaticCache.allocate(config, plan, batch=max_batch, max_seq_len=length, device=target, dtype=kv_format)
    return LLM(runner, tokenizer, cache, template, weight_format or dtype_name(number_format))


def _affordable_length(
    config: ModelConfig, plan: SharingPlan, batch: int, dtype: torch.dtype, device: torch.device
) -> int:
    per_slot = kv_bytes(config, plan, 1, dtype.itemsize, batch)
    affordable = free_memory(device) // 2 // per_slot
    if affordable >= cache_slots(config, config.max_seq_len):
        return config.max_seq_len
    return min(max(256, affordable // 256 * 256), config.max_seq_len)


class LLM:
    """A loaded model. One generation at a time: starting the next one ends the one before, in whatever thread."""

    def __init__(
        self,
        runner: Runner,
        tokenizer: Tokenizer,
        cache: StaticCache,
        find_template: Callable[[], ChatTemplate],
        weight_format: str,
    ) -> None:
        """weight_format: for people, "bf16" or "int4" say."""
        self.runner = runner
        self.model = runner.model
        self.tokenizer = tokenizer
        self.cache = cache
        self.weight_format = weight_format
        self._find_template = find_template
        self._lock = threading.RLock()  # held while anything is computed
        self._generation = 0  # the latest one begun: it has the cache

    @cached_property
    def chat_template(self) -> ChatTemplate:
        """The model's chat template. Raises MinisaError where it is broken: such a model can still `generate`."""
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
        ids = self._checked(token_ids, self.config.longest_seq_len, "token_ids")
        tokens, cache = torch.tensor([ids], device=self.device), self._cache_for(ids)
        with self._lock, torch.inference_mode():
            parts = [logits.float() for logits in self.runner.all_logits(tokens, 0, cache)]
        return torch.cat(parts)  # out here, so that the caller may change it

    def prefix(self, beginning: Prompt | Sequence[Message]) -> Prefix:
        """A beginning that prompts share, computed once: keys and values for `prefix=` of `generate` and `chat`.

        beginning: text, token ids, or the messages that chats begin with, a system prompt for example. It takes
        memory of its own, `costs.kv_bytes` of so many tokens, and leaves llm.cache alone.
        Raises MinisaError as `generate` does.
        """
        if is_chat(beginning):
            # What two chats have in common that part there.
            one, other = (
                self.chat_template.ids([*beginning, {"role": "user", "content": text}]) for text in ("a", "b")
            )
            beginning = one[: common_prefix(one, other)]
        ids = self._prompt_ids(beginning)  # type: ignore[arg-type]
        cache = self._cache_for(ids)
        with self._lock, torch.inference_mode():
            self.runner.prefill(torch.tensor([ids], device=self.device), 0, cache)
        cache.tokens[0][:] = ids
        return Prefix(cache, self.model)

    def _cache_for(self, ids: list[int]) -> StaticCache:
        """One row, for these tokens."""
        return StaticCache.allocate(
            self.config, self.plan, max_seq_len=len(ids), device=self.device, dtype=self.cache.values.dtype
        )

    def generate(self, prompts: Prompt | Sequence[Prompt], **options: Any) -> Iterator[Chunk]:
        """Continue one prompt or several at once, streaming.

        prompts: text, token ids, or a list of either (at most max_batch). Text gets the BOS token where the model's
            maker puts it; special tokens spelled in it are plain text.
        options: the fields of `Options` in generation/options.py: temperature, top_k, top_p, min_p,
            repetition_penalty, seed, max_new_tokens, stop, stop_ids, prefix and speculate.
        Raises MinisaError for an empty or too long prompt or an option out of range, before anything is computed; on
        the way once another generation has begun on the model, after an interrupted step, and for logits that are not
        finite.
        """
        asked = Options(**options)
        one = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))
        rows = [prompts] if one else list(prompts)
        return self._start([self._prompt_ids(prompt) for prompt in rows], asked, answers=False)  # type: ignore[arg-type]

    def chat(self, messages: Sequence[Message], **options: Any) -> Iterator[Chunk]:
        """Answer the last of messages, [{"role": "user", "content": ...}, ...]; options as in `generate`.

        What the chat has in common with the cache, usually everything but the last message, is not computed again.
        Raises MinisaError as `generate` does, and for messages that the chat template has no place for.
        """
        asked = Options(**options)
        return self._start([self._chat_ids(messages)], asked, answers=True)

    def batch(self, **sampling: Any) -> Batch:
        """Rows, max_batch of them, that prompts can be added to and cancelled from while others are continued.

        sampling: temperature, top_k, top_p, min_p and repetition_penalty, as in `Sampling`, for every row.
        Like the start of a generation it ends the one before.
        Raises MinisaError for an option out of range.
        """
        loop = DecodingLoop(self.runner, self.cache, Sampling(**sampling), self.cache.batch)
        return Batch(loop, partial(self._turn, self._begin()), self._prepare)

    def _prepare(self, prompt: Prompt | Sequence[Message], options: dict[str, Any]) -> PreparedRow:
        """What `Batch.add` is given, checked."""
        if wrong := options.keys() & {*Sampling.__slots__, "speculate"}:
            raise MinisaError(f"add: {min(wrong)} is not a row's own: give it to batch, or leave it out")
        asked = Options(**options)
        answers = is_chat(prompt)
        ids = self._chat_ids(prompt) if answers else self._prompt_ids(prompt)  # type: ignore[arg-type]
        return self._row(ids, asked, asked.seeds(1)[0], answers)

    def _start(self, prompts: list[list[int]], options: Options, *, answers: bool) -> Iterator[Chunk]:
        if not 0 < len(prompts) <= self.cache.batch:
            raise MinisaError(
                f"generate: {len(prompts) or 'no'} prompts for max_batch {self.cache.batch}: give some, or load "
                "with a larger max_batch"
            )
        if options.speculate and len(prompts) > 1:
            raise MinisaError(f"generate: speculate is for one prompt, {len(prompts)} are given: leave it out")
        seeds = options.seeds(len(prompts))
        rows = [self._row(ids, options, seed, answers) for ids, seed in zip(prompts, seeds, strict=True)]

        def stream() -> Iterator[Chunk]:
            generation = self._begin()
            with self._turn(generation):
                loop = DecodingLoop(self.runner, self.cache, options.sampling, len(rows))
                for row in rows:
                    loop.add(*row)
            yield from Batch(loop, partial(self._turn, generation), self._prepare)

        return stream()

    def _row(self, ids: list[int], options: Options, seed: int | None, answers: bool) -> PreparedRow:
        """answers: the row's text is a text of its own; else it goes on from the prompt's, whose spaces it shares."""
        if options.prefix is not None and options.prefix.model is not self.model:
            raise MinisaError("prefix is another model's: make it by this one's llm.prefix")
        stop_ids = options.stop_ids
        if stop_ids is None:
            stop_ids = self.chat_template.stop_ids if answers else self.tokenizer.eos_ids
        return ids, replace(options, seed=seed, stop_ids=stop_ids), self.tokenizer.stream(mid_text=not answers)

    def _begin(self) -> int:
        """A new generation takes the cache."""
        with self._lock:
            self._generation += 1
            return self._generation

    @contextmanager
    def _turn(self, generation: int) -> Iterator[None]:
        """One step of a generation, alone. Raises MinisaError once another has begun, and after a step that was broken
        off half way: what has been computed and what has been given out no longer agree then."""
        with self._lock:
            if generation != self._generation:
                raise MinisaError(
                    "generate: another generation has begun on this model, or a step was interrupted: begin anew"
                )
            try:
                yield
            except MinisaError:
                raise
            except BaseException:
                self._generation += 1
                raise

    def _prompt_ids(self, prompt: Prompt) -> list[int]:
        if prompt == "":
            raise MinisaError("the prompt is empty: give some text")
        ids = self.tokenizer.bos_ids + self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        return self._checked(ids, self.cache.length, "the prompt")

    def _chat_ids(self, messages: Sequence[Message]) -> list[int]:
        return self._checked(self.chat_template.ids(messages), self.cache.length, "the prompt")

    def _checked(self, ids: Sequence[int], limit: int, what: str) -> list[int]:
        """Token ids as a list. Raises MinisaError for none, too many, and what is no id of the vocabulary."""
        vocab_size = self.config.vocab_size
        wrong = [token for token in ids if not (isinstance(token, int) and 0 <= token < vocab_size)]
        if wrong or not len(ids):
            found = f"has {wrong[0]!r}" if wrong else "is empty"
            raise MinisaError(f"{what} {found}: expected text or token ids, 0 to {vocab_size - 1}")
        if len(ids) > limit:
            raise MinisaError(f"{what} is {len(ids)} tokens long, the context {limit}: shorten it or raise max_seq_len")
        return list(ids)


def is_chat(prompt: Prompt | Sequence[Message]) -> bool:
    """Whether it is messages, not text or token ids."""
    return not isinstance(prompt, str) and len(prompt) > 0 and isinstance(prompt[0], Mapping)
