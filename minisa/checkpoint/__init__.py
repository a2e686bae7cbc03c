"""Checkpoints: every file format a Llama or Mistral model comes in, as one stream of named tensors.

    path ── open_checkpoint ──> Checkpoint: config + {parameter name: StoredTensor}     (headers only)
    Checkpoint ── load_weights ──> the model's parameters, on their device, in their dtype

Opening reads no weight, but for a head that should be the embedding. Loading reads each file front to back, a few rows
at a time.
"""

from minisa.checkpoint.delta import as_stored, with_delta, write_delta
from minisa.checkpoint.files import StoredTensor
from minisa.checkpoint.gguf import read_gguf
from minisa.checkpoint.layouts import Checkpoint, open_checkpoint
from minisa.checkpoint.load import load_weights

__all__ = [
    "Checkpoint",
    "StoredTensor",
    "as_stored",
    "load_weights",
    "open_checkpoint",
    "read_gguf",
    "with_delta",
    "write_delta",
]
