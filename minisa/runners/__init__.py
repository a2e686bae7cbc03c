"""What executes a step: eager PyTorch, CUDA graphs with Triton kernels, or C++."""

from minisa.runners.choice import *
from minisa.runners.choice import native_step


def native_library(config, target, compile):
    return native_step(config, target, compile=True if compile is None else compile, quantized=True)


def choose_runner(model, compile, library):
    from minisa.runners import choice

    return choice.choose_runner(model, True if library is not None else compile)
