"""Triton kernels for the steps that read memory: attention of few queries a row, and quantized matrices times one row.

Imported only where Triton is there and a device (or its interpreter, TRITON_INTERPRET=1) to run it.
"""
