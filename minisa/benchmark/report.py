"""The record of a run: everything measured and everything the formulas say, as one JSON object.

    version, interrupted
    model           name, random_weights, layers, dim, parameters, max_seq_len
    run             device, device_name, dtype, quantize, kv_dtype, batch, threads, compile, new_tokens, repeats,
                    cache_slots, greedy_tokens, torch
    ceiling         way and buffer_bytes of the reading; start, end: read_bandwidth (bytes/s) and matrix_rate
                    (operations/s), best and median
    configurations  plain, shared, the peers:
        name, plan, followers, detail, load_seconds, first_token_seconds (of the first request, prompt_tokens long)
        weight_bytes, kv_bytes, kv_bytes_by_formula
        memory_before_load, peak_memory (bytes: of the process; of torch's allocator on a GPU)
        weights_over_plain, kv_over_plain: ratio, predicted
        same_greedy_tokens (as plain's before the first that differs, of greedy_tokens)
    cells           one for each configuration and length:
        configuration, kind ("prefill" of, or "decode" after), tokens, rounds, steps
        tokens_per_second   median, p10, p90, over single steps
        bytes               that a decode step reads: weights, keys, values, shared_rows, total; flops
        allowed_tokens_per_second, by the best bandwidth and matrix rate at the start
        bandwidth           median, best of what was read in the same rounds
        share               of that median for decode; of the best matrix rate at the start for prefill
        ratio               of speeds, median over rounds, p10, p90: shared over plain, or plain over a peer
        predicted           for shared over plain: by bytes for decode, by operations for prefill

Numbers that were not measured, or make no sense for a peer, are null.
"""

from __future__ import annotations

import platform
import statistics
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from minisa.benchmark.measure import Spread
from minisa.benchmark.run import Benchmark, Ceiling, Cell, Configuration
from minisa.benchmark.settings import GREEDY_TOKENS, Settings
from minisa.costs import StepCost, kv_bytes, parameter_count, prefill_flops, step_cost
from minisa.device import dtype_name
from minisa.quantize import INT8_BYTES

VERSION = 2
Record = dict[str, Any]


def record(benchmark: Benchmark, interrupted: bool = False) -> Record:
    """What is known by now, once the ceiling has been measured."""
    settings, plain = benchmark.settings, benchmark.configurations[0]
    opening, config = settings.opening, settings.opening.config
    ceilings = {when: benchmark.ceilings.get(when) for when in ("start", "end")}
    return {
        "version": VERSION,
        "interrupted": interrupted,
        "model": {
            "name": settings.name,
            "random_weights": opening.path is None,
            "layers": config.n_layers,
            "dim": config.dim,
            "parameters": parameter_count(config, opening.plan),
            "max_seq_len": config.max_seq_len,
        },
        "run": {
            "device": str(opening.device),
            "device_name": device_name(opening.device),
            "dtype": dtype_name(plain.facts.dtype),
            "quantize": opening.quantize,
            "kv_dtype": dtype_name(plain.facts.kv_dtype),
            "batch": opening.batch,
            "threads": opening.threads,
            "compile": opening.compile,
            "new_tokens": settings.new_tokens,
            "repeats": settings.repeats,
            "cache_slots": opening.context,
            "greedy_tokens": GREEDY_TOKENS,
            "torch": torch.__version__,
        },
        "ceiling": {
            "way": benchmark.reader.way,
            "buffer_bytes": benchmark.reader.nbytes,
            **{when: ceiling and _ceiling(ceiling) for when, ceiling in ceilings.items()},
        },
        "configurations": [_configuration(settings, it, plain) for it in benchmark.configurations],
        "cells": [_cell(benchmark, cell) for cell in _planned(benchmark)],
    }


def _planned(benchmark: Benchmark) -> list[Cell]:
    """The cells that were measured, and those to come."""
    found = {(cell.kind, cell.tokens, cell.configuration.name): cell for cell in benchmark.cells}
    lengths = [("prefill", length) for length in benchmark.settings.prompt_lengths]
    lengths += [("decode", context) for context in benchmark.settings.contexts]
    return [
        found.get((kind, tokens, configuration.name), Cell(configuration, kind, tokens, []))
        for kind, tokens in lengths
        for configuration in benchmark.configurations
    ]


def _ceiling(ceiling: Ceiling) -> Record:
    readings = {"read_bandwidth": ceiling.bandwidth, "matrix_rate": ceiling.matrix}
    return {name: {"best": max(each), "median": statistics.median(each)} for name, each in readings.items()}


def _configuration(settings: Settings, it: Configuration, plain: Configuration) -> Record:
    facts, opening, config = it.facts, settings.opening, settings.opening.config
    slots, itemsize = opening.context, facts.kv_dtype.itemsize
    ours = facts.kv_bytes is not None
    sharing: Record = {"weights_over_plain": None, "kv_over_plain": None}
    if it.name == "shared":
        weights, plain_weights = (parameter_count(config, each.plan) for each in (it, plain))
        kept, plain_kept = (kv_bytes(config, each.plan, 1, 1) for each in (it, plain))
        ratios = facts.weight_bytes / plain.facts.weight_bytes, (facts.kv_bytes or 0) / (plain.facts.kv_bytes or 1)
        sharing["weights_over_plain"] = {"ratio": ratios[0], "predicted": weights / plain_weights}
        sharing["kv_over_plain"] = {"ratio": ratios[1], "predicted": kept / plain_kept}
    return {
        "name": it.name,
        "plan": str(it.plan),
        "followers": len(it.plan.followers),
        "detail": facts.detail,
        "load_seconds": facts.load_seconds,
        "first_token_seconds": it.first_token,
        "prompt_tokens": settings.prompt_lengths[0],
        "weight_bytes": facts.weight_bytes,
        "kv_bytes": facts.kv_bytes,
        "kv_bytes_by_formula": kv_bytes(config, it.plan, slots, itemsize, opening.batch) if ours else None,
        "memory_before_load": facts.memory_before,
        "peak_memory": facts.peak_memory,
        **sharing,
        "same_greedy_tokens": None if it is plain else it.agreement,
    }


def _cell(benchmark: Benchmark, cell: Cell) -> Record:
    settings, start = benchmark.settings, benchmark.ceilings["start"]
    it, decoding = cell.configuration, cell.kind == "decode"
    steps = [seconds for round in cell.rounds for seconds in round]
    seconds = Spread.of(steps) if steps else None
    tokens = settings.opening.batch if decoding else cell.tokens
    step = cost(settings, it, cell.tokens) if decoding else None
    flops = step.flops if step else prefill_flops(settings.opening.config, it.plan, cell.tokens)
    fastest = max(flops / max(start.matrix), step.bytes / max(start.bandwidth) if step else 0)
    beside = statistics.median(cell.bandwidth) if cell.bandwidth else None
    if step:
        share = step.bytes / seconds.median / beside if seconds and beside else None
    else:
        share = fastest / seconds.median if seconds else None
    return {
        "configuration": it.name,
        "kind": cell.kind,
        "tokens": cell.tokens,
        "rounds": len(cell.rounds),
        "steps": len(steps),
        "tokens_per_second": seconds and asdict(seconds.rate(tokens)),
        "bytes": step and {part: getattr(step, part) for part in PARTS} | {"total": step.bytes},
        "flops": flops,
        "allowed_tokens_per_second": tokens / fastest,
        "bandwidth": beside and {"median": beside, "best": max(cell.bandwidth)},
        "share": share,
        **_ratio(benchmark, cell),
    }


PARTS = ("weights", "keys", "values", "shared_rows")


def cost(settings: Settings, it: Configuration, context: int) -> StepCost:
    """Of one decode step in the middle of those that are timed at a context."""
    config, facts = settings.opening.config, it.facts
    read = facts.weight_bytes
    if not config.tie_embeddings:  # of an embedding that is not the head too a step reads a row
        each = INT8_BYTES if settings.opening.quantize else facts.weight_bytes / parameter_count(config, it.plan)
        read -= round(config.vocab_size * config.dim * each)
    middle, itemsize = context + (settings.new_tokens + 1) // 2, facts.kv_dtype.itemsize
    batch = settings.opening.batch
    return step_cost(config, it.plan, middle, weight_bytes=read, kv_itemsize=itemsize, batch=batch)


def _ratio(benchmark: Benchmark, cell: Cell) -> Record:
    """How many times as fast shared is as plain, or plain as a peer: round by round, so that what disturbed a round
    cancels out."""
    plain, it = benchmark.configurations[0], cell.configuration
    if it is plain:
        return {"ratio": None, "predicted": None}
    own = [each.rounds for each in benchmark.cells if each.configuration is plain and each.bandwidth is cell.bandwidth]
    pairs: Iterable[tuple[list[float], list[float]]] = zip(*own, cell.rounds, strict=False) if own else ()
    ratios = [statistics.median(plains) / statistics.median(others) for plains, others in pairs]
    if it.name != "shared":
        return {"ratio": asdict(Spread.of([1 / ratio for ratio in ratios])) if ratios else None, "predicted": None}
    settings, config = benchmark.settings, benchmark.settings.opening.config
    if cell.kind == "decode":
        amounts = [cost(settings, each, cell.tokens).bytes for each in (plain, it)]
    else:
        amounts = [prefill_flops(config, each.plan, cell.tokens) for each in (plain, it)]
    return {"ratio": asdict(Spread.of(ratios)) if ratios else None, "predicted": amounts[0] / amounts[1]}


def device_name(device: torch.device) -> str:
    """What the maker calls it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
