"""The CPU's own step: the whole model in C++, weights packed once; the machine's compiler builds it at first use.

    build.py     step.cpp and its headers → a shared library in the user's cache folder
    packing.py   weights → panels of 32 rows, as matmul.h reads them
    runner.py    NativeRunner: the Runner interface over the library

At SmolLM2's size the overhead of a step through PyTorch, not the memory, decides its speed; a step here is one call.
"""
