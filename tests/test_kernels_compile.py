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
    """Llama-3-8B's shapes with each value of every option: dtypes, an fp8 cache, a window and its ring, a head map; a
    product in int8 and int4."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from minisa.runners.kernels import decode_attention, quantized_product

    sizes = {"GROUP": 4, "ROWS": 16, "HEAD_DIM": 128, "DIMS": 128, "QUERIES": 8}
    types = {"bf16": triton.language.bfloat16, "fp16": triton.language.float16, "fp32": triton.language.float32}
    block = decode_attention.BLOCK
    cases = []
    options = [("bf16", fp8, window, True) for fp8 in (False, True) for window in (0, 4096)]
    for dtype, fp8, window, mapped in (
        *options,
        ("bf16", False, 0, False),
        ("fp16", False, 0, True),
        ("fp32", False, 0, True),
    ):
        common = sizes | {"WINDOW": window, "RING": window and window + SLACK, "FP8": fp8}
        common["BLOCK"] = block // 2 if dtype == "fp32" else block
        cases.append((decode_attention._lead, common, dtype, fp8))
        cases.append((decode_attention._follow, common | {"MAPPED": mapped, "DTYPE": types[dtype]}, dtype, fp8))
    merge = {"HEAD_DIM": 128, "DIMS": 128, "PARTS": 64}
    cases += [(decode_attention._merge, merge | {"NORMALIZED": normed}, "bf16", False) for normed in (False, True)]
    for bits in (4, 8):
        product = {"n_blocks": 448, "BLOCK_N": 1, "BLOCKS": 128, "BITS": bits}
        cases.append((quantized_product._multiply_row.fn, product, "fp32", bits == 4))
    for function, constants, dtype, bytes_ in cases:
        pointers = dict.fromkeys(("positions", "head_map", "quants", "x"), "i64")
        pointers |= dict.fromkeys(("keys", "values"), "u8" if bytes_ else dtype)
        pointers |= dict.fromkeys(("scales", "minimums"), "fp16") | dict.fromkeys(("q", "out"), dtype)
        numbers = {"scale": "fp32", "row_stride": "i64", "head_stride": "i64"}
        numbers |= dict.fromkeys(("length", "n_parts", "raised", "n"), "i32")
        signature, aligned = {}, {}
        for i, name in enumerate(function.arg_names):
            if name in constants:
                signature[name] = "constexpr"
            else:
                signature[name] = numbers.get(name) or f"*{pointers.get(name, 'fp32')}"
                if name not in ("scale", "n_parts", "raised"):
                    aligned[(i,)] = [["tt.divisibility", 16]]
        values = {(function.arg_names.index(name),): value for name, value in constants.items()}
        source = ASTSource(function, signature, values, aligned)
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4})
        assert compiled.asm["cubin"]
        assert compiled.metadata.shared <= SHARED_MEMORY, (function.__name__, compiled.metadata.shared)
        if function.__name__ in ("_lead", "_follow") and not bytes_ and dtype != "fp32":
            assert "mma" in compiled.asm["ptx"] and "cp.async" in compiled.asm["ptx"]  # loads run ahead of products


@pytest.mark.parametrize("capability", [80, 90])
def test_the_kernels_compile_with_every_option(capability: int, tmp_path: Path) -> None:
    """In a process of its own, where Triton does not interpret."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    script = f"from tests.test_kernels_compile import compile_for; compile_for({capability})"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[1], env=environment)
