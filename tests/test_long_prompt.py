"""What a prompt of 128k tokens takes beyond the model and the cache, in fresh processes. Linux only."""

from __future__ import annotations

import shutil
import sys

import pytest

from tests.long_prompt import measure

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.mark.parametrize("spans", ["none", "2-3"])
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_the_step_keeps_its_rows_of_attention_weights_few(spans: str) -> None:
    """64 of them for each of 32 heads would be a gigabyte."""
    memory, _ = measure("C++ step", spans, 131_072, n_tokens=64, n_heads=32)
    assert memory < (160e6 if spans == "2-3" else 40e6)


def test_the_mask_of_a_chunk_in_eager_mode() -> None:
    """512 tokens' as floats would be 268 MB by itself."""
    memory, _ = measure("eager fp32", "2-3", 131_072, n_tokens=512, n_heads=1)
    assert memory < 250e6
