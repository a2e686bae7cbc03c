"""What executes a step: eager PyTorch, CUDA graphs with Triton kernels, or C++."""
