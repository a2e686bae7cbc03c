"""What bench.py and `python -m minisa selfcheck` run; README.md says how they measure.

    flags ── choose ──> Settings ──> Benchmark ──> record (JSON) ──> tables, plot
                                         │ turns
                       ┌───────────┬─────┴──────┬──────────────┐
                     plain       shared    transformers    llama.cpp     a Contender each, in a Worker process

This package uses the engine; the engine knows nothing of it.
"""
