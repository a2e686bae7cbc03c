"""The record of a run: everything measured and everything the formulas say, as one JSON object.

    version, interrupted
    model             name, random_weights, layers, dim, parameters, max_seq_len
    run               device, device_name, dtype, quantize, kv_dtype, batch, threads, compile, new_tokens,
                      repeats, cache_slots, torch
    ceiling           read_bandwidth (bytes/s) and matrix_rate (operations/s): best and median, at the start and at
                      the end of the run; way and buffer_bytes of the reading
    configurations    one each for plain, shared and the peers:
        name, plan, followers, detail, chosen (the way to run that was a peer's fastest)
        load_seconds, first_token_seconds (of the first request, prompt_tokens long)
        weight_bytes, kv_bytes, kv_bytes_by_formula, kv_bytes_match
        memory_before_load, peak_memory (bytes: of the process; of torch's allocator on a GPU)
        prefill       for each prompt length: tokens, rounds; seconds and tokens_per_second, each with median, p10,
                      p90; flops, share_of_matrix_rate
        decode        for each context: context, rounds, steps; tokens_per_second with median, p10, p90 over single
                      steps; bytes of one step (weights, keys, values, shared_rows, total) and its flops;
                      allowed_tokens_per_second, by the best bandwidth and matrix rate at the start; bandwidth, the
                      median of what was read in the same rounds; share_of_bandwidth, of that median;
                      share_of_best_bandwidth, of the best of those readings
    shared_over_plain weight_bytes, kv_bytes: ratio, predicted; prefill, decode: for each length the ratio of speeds
                      (median over rounds, p10, p90) and what is predicted: for decode by bytes, for prefill by
                      operations
    plain_over_peers  for each peer: name, same_greedy_tokens of greedy_tokens; prefill, decode: the ratios of speeds

Numbers that were not measured, or make no sense for a peer, are null.
"""

from __future__ import annotations

import platform
import statistics
from pathlib import Path
from typing import Any

import torch

from minisa.benchmark.measure import Spread
from minisa.benchmark.run import Benchmark, Ceiling, Measured
from minisa.benchmark.settings import GREEDY_TOKENS, Settings
from minisa.costs import StepCost, kv_bytes, parameter_count, prefill_flops, step_cost
from minisa.device import dtype_name
from minisa.quantize import INT8_BYTES

VERSION = 1
Record = dict[str, Any]


def record(benchmark: Benchmark, interrupted: bool = False) -> Record:
    """What is known by now. Raises nothing, however little that is."""
    settings = benchmark.settings
    opening, config = settings.opening, settings.opening.config
    own = benchmark.own
    return {
        "version": VERSION,
        "interrupted": interrupted,
        "model": {
            "name": settings.name,
            "random_weights": settings.random_weights,
            "layers": config.n_layers,
            "dim": config.dim,
            "parameters": parameter_count(config, opening.plan),
            "max_seq_len": config.max_seq_len,
        },
        "run": {
            "device": str(opening.device),
            "device_name": device_name(opening.device),
            "dtype": dtype_name(opening.dtype),
            "quantize": opening.quantize,
            "kv_dtype": dtype_name(opening.kv_dtype or opening.dtype),
            "batch": opening.batch,
            "threads": opening.threads,
            "compile": opening.compile,
            "new_tokens": settings.new_tokens,
            "repeats": settings.repeats,
            "cache_slots": opening.context,
            "torch": torch.__version__,
        },
        "ceiling": {
            "read_bandwidth": {
                "way": benchmark.reader and benchmark.reader.way,
                "buffer_bytes": benchmark.reader and benchmark.reader.nbytes,
                "start": benchmark.start and _best_and_median(benchmark.start.bandwidth),
                "end": benchmark.end and _best_and_median(benchmark.end.bandwidth),
            },
            "matrix_rate": {
                "start": benchmark.start and _best_and_median(benchmark.start.matrix),
                "end": benchmark.end and _best_and_median(benchmark.end.matrix),
            },
        },
        "configurations": [_configuration(benchmark, measured) for measured in benchmark.everyone],
        "shared_over_plain": _shared_over_plain(settings, own[0], own[1]) if len(own) == 2 else None,
        "plain_over_peers": [_plain_over_peer(settings, own[0], peer) for peer in benchmark.peers],
    }


def _configuration(benchmark: Benchmark, measured: Measured) -> Record:
    settings, facts = benchmark.settings, measured.facts
    opening, config = settings.opening, settings.opening.config
    formula = None
    if facts.kv_bytes is not None:
        formula = kv_bytes(config, measured.plan, opening.context, facts.kv_itemsize, opening.batch)
    return {
        "name": measured.name,
        "plan": str(measured.plan),
        "followers": len(measured.plan.followers),
        "detail": facts.detail,
        "chosen": measured.chosen,
        "load_seconds": facts.load_seconds,
        "first_token_seconds": measured.first_token,
        "prompt_tokens": settings.prompt_lengths[0],
        "weight_bytes": facts.weight_bytes,
        "kv_bytes": facts.kv_bytes,
        "kv_bytes_by_formula": formula,
        "kv_bytes_match": None if formula is None else facts.kv_bytes == formula,
        "memory_before_load": facts.memory_before,
        "peak_memory": measured.peak_memory,
        "prefill": [_prefill(benchmark, measured, length) for length in settings.prompt_lengths],
        "decode": [_decode(benchmark, measured, context) for context in settings.contexts],
    }


def _prefill(benchmark: Benchmark, measured: Measured, length: int) -> Record:
    times = measured.prefill.get(length)
    flops = prefill_flops(benchmark.settings.opening.config, measured.plan, length)
    seconds = Spread.of(times) if times else None
    start = benchmark.start
    return {
        "tokens": length,
        "rounds": len(times or ()),
        "seconds": _spread(seconds),
        "tokens_per_second": _spread(seconds and seconds.rate(length)),
        "flops": flops,
        "share_of_matrix_rate": flops / seconds.median / max(start.matrix) if seconds and start else None,
    }


def _decode(benchmark: Benchmark, measured: Measured, context: int) -> Record:
    settings = benchmark.settings
    batch = settings.opening.batch
    steps = [seconds for burst in measured.decode.get(context, ()) for seconds in burst]
    cost = decode_cost(settings, measured, context)
    seconds = Spread.of(steps) if steps else None
    beside = benchmark.beside.get(context)
    speed = cost.bytes / seconds.median if seconds else None
    return {
        "context": context,
        "rounds": len(measured.decode.get(context, ())),
        "steps": len(steps),
        "tokens_per_second": _spread(seconds and seconds.rate(batch)),
        "bytes": {
            "weights": cost.weights,
            "keys": cost.keys,
            "values": cost.values,
            "shared_rows": cost.shared_rows,
            "total": cost.bytes,
        },
        "flops": cost.flops,
        "allowed_tokens_per_second": benchmark.start and batch / _fastest_step(cost, benchmark.start),
        "bandwidth": beside and statistics.median(beside),
        "share_of_bandwidth": speed / statistics.median(beside) if speed and beside else None,
        "share_of_best_bandwidth": speed / max(beside) if speed and beside else None,
    }


def decode_cost(settings: Settings, measured: Measured, context: int) -> StepCost:
    """Of one step in the middle of those that are timed at a context."""
    config, facts = settings.opening.config, measured.facts
    read = facts.weight_bytes
    if not config.tie_embeddings:  # of an embedding that is not the head too a step reads a row
        whole = facts.weight_bytes / parameter_count(config, measured.plan)
        read -= round(config.vocab_size * config.dim * (INT8_BYTES if settings.opening.quantize else whole))
    return step_cost(
        config,
        measured.plan,
        context + (settings.new_tokens + 1) // 2,
        weight_bytes=read,
        kv_itemsize=facts.kv_itemsize,
        batch=settings.opening.batch,
    )


def device_name(device: torch.device) -> str:
    """What the maker calls it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _fastest_step(cost: StepCost, ceiling: Ceiling) -> float:
    """Seconds a step takes at least."""
    return max(cost.bytes / max(ceiling.bandwidth), cost.flops / max(ceiling.matrix))


def _shared_over_plain(settings: Settings, plain: Measured, shared: Measured) -> Record:
    config = settings.opening.config

    def predicted_prefill(length: int) -> float:
        return prefill_flops(config, plain.plan, length) / prefill_flops(config, shared.plan, length)

    def predicted_decode(context: int) -> float:
        return decode_cost(settings, plain, context).bytes / decode_cost(settings, shared, context).bytes

    prefills, decodes = _speed_ratios(settings, shared, plain)
    per_slot = [kv_bytes(config, measured.plan, 1, measured.facts.kv_itemsize) for measured in (shared, plain)]
    weights = [parameter_count(config, measured.plan) for measured in (shared, plain)]
    measured_kv = [shared.facts.kv_bytes or 0, plain.facts.kv_bytes or 1]
    return {
        "weight_bytes": {
            "ratio": shared.facts.weight_bytes / plain.facts.weight_bytes,
            "predicted": weights[0] / weights[1],
        },
        "kv_bytes": {"ratio": measured_kv[0] / measured_kv[1], "predicted": per_slot[0] / per_slot[1]},
        "prefill": [ratio | {"predicted": predicted_prefill(ratio["tokens"])} for ratio in prefills],
        "decode": [ratio | {"predicted": predicted_decode(ratio["context"])} for ratio in decodes],
    }


def _plain_over_peer(settings: Settings, plain: Measured, peer: Measured) -> Record:
    prefills, decodes = _speed_ratios(settings, plain, peer)
    return {
        "name": peer.name,
        "same_greedy_tokens": peer.agreement,
        "greedy_tokens": GREEDY_TOKENS,
        "prefill": prefills,
        "decode": decodes,
    }


def _speed_ratios(settings: Settings, upper: Measured, lower: Measured) -> tuple[list[Record], list[Record]]:
    """How many times as fast `upper` is: round by round, so that what disturbed a round cancels out."""
    prefills = [
        {"tokens": length} | _ratio(zip(lower.prefill.get(length, ()), upper.prefill.get(length, ()), strict=False))
        for length in settings.prompt_lengths
    ]
    decodes = [
        {"context": context}
        | _ratio(
            (statistics.median(low), statistics.median(high))
            for low, high in zip(lower.decode.get(context, ()), upper.decode.get(context, ()), strict=False)
        )
        for context in settings.contexts
    ]
    return prefills, decodes


def _ratio(pairs: Any) -> Record:
    ratios = [slower / faster for slower, faster in pairs]
    if not ratios:
        return {"ratio": None, "p10": None, "p90": None}
    spread = Spread.of(ratios)
    return {"ratio": spread.median, "p10": spread.p10, "p90": spread.p90}


def _spread(spread: Spread | None) -> Record | None:
    return None if spread is None else {"median": spread.median, "p10": spread.p10, "p90": spread.p90}


def _best_and_median(readings: list[float]) -> Record:
    return {"best": max(readings), "median": statistics.median(readings)}
