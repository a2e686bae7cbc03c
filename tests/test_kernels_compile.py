"""The kernels compiled for cards that need not be there: what the interpreter lets pass, the compiler may not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from minisa.costs import SLACK

triton = pytest.importorskip("triton", reason='needs pip install "minisa[test]", on Linux')

SHARED_MEMORY = 99 << 10  # bytes a program may take on the cards with least of it (compute capability 8.6 and 8.9)


def compile_for(capability: int) -> None:
    """Llama-3-8B's shapes in bf16 with a bf16 and an fp8 cache, and its first product in int8 and int4; a ring."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from minisa.kernels import decode_attention, quantized_product

    sizes = {"GROUP": 4, "ROWS": 16, "HEAD_DIM": 128, "DIMS": 128}
    product = quantized_product._multiply.fn
    cases = []
    for fp8, window in ((False, 0), (True, 0), (False, 4096)):
        common = {**sizes, "WINDOW": window, "RING": window and window + SLACK, "FP8": fp8}
        common["BLOCK"] = decode_attention.BLOCK
        cases.append((decode_attention._lead, common, fp8))
        cases.append((decode_attention._follow, common | {"MAPPED": True, "DTYPE": triton.language.bfloat16}, fp8))
    merge = {"HEAD_DIM": 128, "DIMS": 128, "PARTS": 64, "NORMALIZED": False}
    cases.append((decode_attention._merge, merge, False))
    for int4 in (False, True):
        for rows in (1, 16):
            cases.append((product, {"ROWS": rows, "INT4": int4, "BLOCK_N": 16, "BLOCKS": 8}, int4))
    for function, constants, bytes_ in cases:
        pointers = {"positions": "i64", "head_map": "i64", "quants": "u8" if bytes_ else "i8"}
        pointers |= dict.fromkeys(("keys", "values"), "u8" if bytes_ else "bf16")
        pointers |= dict.fromkeys(("scales", "minimums"), "fp16") | dict.fromkeys(("q", "x", "out"), "bf16")
        numbers = {"scale": "fp32", "row_stride": "i64", "head_stride": "i64"}
        numbers |= dict.fromkeys(("length", "n_parts", "n_rows", "n", "k"), "i32")
        signature, aligned = {}, {}
        for i, name in enumerate(function.arg_names):
            if name in constants:
                signature[name] = "constexpr"
            else:
                signature[name] = numbers.get(name) or f"*{pointers.get(name, 'fp32')}"
                if name not in ("scale", "n_parts", "n_rows"):
                    aligned[(i,)] = [["tt.divisibility", 16]]
        values = {(function.arg_names.index(name),): value for name, value in constants.items()}
        source = ASTSource(function, signature, values, aligned)
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4})
        assert compiled.asm["cubin"]
        assert compiled.metadata.shared <= SHARED_MEMORY, (function.__name__, compiled.metadata.shared)
        if function.__name__ in ("_lead", "_follow") and not bytes_:
            assert "mma" in compiled.asm["ptx"] and "cp.async" in compiled.asm["ptx"]  # loads run ahead of products


@pytest.mark.parametrize("capability", [80, 90])
def test_every_kernel_compiles(capability: int, tmp_path: Path) -> None:
    """In a process of its own, where Triton does not interpret."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    script = f"from tests.test_kernels_compile import compile_for; compile_for({capability})"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[1], env=environment)
