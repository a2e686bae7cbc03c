"""What bench.py runs: configurations that take turns on one machine, each in a process of its own.

    Settings ──> Benchmark.run ──> Measurements ──> record (JSON) ──> table, plot
                     │ turns
         ┌───────────┼────────────┬──────────────┐
      plain       shared     transformers    llama.cpp      one Worker process each, idle while others run

A process of its own makes peak memory that configuration's own, keeps one's threads from spinning in another's
time, and lets a peer crash alone. This package uses the engine; the engine knows nothing of it.
"""
