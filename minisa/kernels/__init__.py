"""Triton kernels for the steps that read memory: attention of one query a row, and quantized matrices times few rows.

Imported only where Triton is there and a device (or its interpreter, TRITON_INTERPRET=1) to run it.
"""
