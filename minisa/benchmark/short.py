"""A short benchmark of a shape with random weights, for a look at a new machine."""

from __future__ import annotations

import json

import torch

from minisa.benchmark import table
from minisa.benchmark.report import record
from minisa.benchmark.run import Benchmark
from minisa.benchmark.settings import Settings
from minisa.device import free_memory

LARGE, LARGE_BYTES = "llama3-8b", 40 << 30  # plain and shared are loaded at once, 16 GB each


def short_bench(device: torch.device) -> str:
    """Plain against shared in half of the layers: the table, and the record as a last line."""
    large = device.type == "cuda" and free_memory(device) >= LARGE_BYTES
    settings = Settings.resolve(
        model="",
        random_weights=LARGE if large else "smollm2-135m",
        sa="16:17-31" if large else "14:15-29",
        device=str(device),
        contexts=(1000, 7000) if large else (0, 500),
        prompt_lengths=(4096,) if large else (256,),
        repeats=3,
    )
    with Benchmark(settings, lambda *_: None) as benchmark:
        benchmark.measure_ceiling()
        benchmark.open()
        benchmark.measure()
        found = record(benchmark)
    return "\n".join((table.heading(found), table.ceiling(found), table.results(found), "", json.dumps(found)))
