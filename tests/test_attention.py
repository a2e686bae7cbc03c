"""The torch backend against the reference, and the masks."""

from __future__ import annotations

import pytest
import torch

from minisa.attention import REFERENCE, TORCH, AttentionBackend, HeadMap, visible_slots


def heads(batch: int, n_heads: int, n_kv_heads: int, queries: int, slots: int, dim: int = 16) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(n_heads * 1000 + slots)
    shapes = [(batch, n_heads, queries, dim), *[(batch, n_kv_heads, slots, dim)] * 3]
    return [torch.randn(shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize(
    "head_map",
    [None, [0, 1, 2, 3, 4, 5], [5, 0, 3, 3, 1, 2], [4, 5, 1, 1, 2, 3]],
    ids=["none", "identity", "map", "map of whole groups"],
)
@pytest.mark.parametrize("n_kv_heads", [1, 2, 3, 6])
@pytest.mark.parametrize(("start", "queries"), [(0, 1), (0, 7), (12, 1), (12, 7), (40, 24)])
@pytest.mark.parametrize("batch", [1, 3])
def test_torch_equals_reference(
    batch: int, start: int, queries: int, n_kv_heads: int, head_map: list[int] | None
) -> None:
    slots = start + queries
    q, k, v, v_own = heads(batch, 6, n_kv_heads, queries, slots)
    mask = visible_slots(torch.arange(start, slots).expand(batch, -1), slots)
    mapped = None if head_map is None else HeadMap.of(head_map, n_kv_heads)
    expected, weights = REFERENCE.lead(q, k, v, mask)
    got, shared = TORCH.lead(q, k, v, mask)
    torch.testing.assert_close(got, expected, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(
        TORCH.follow(shared, v_own, mapped), REFERENCE.follow(weights, v_own, mapped), atol=2e-6, rtol=1e-5
    )


@pytest.mark.parametrize("backend", [REFERENCE, TORCH], ids=["reference", "torch"])
@pytest.mark.parametrize("queries", [1, 5])
def test_identity_map_is_no_map_to_the_bit(backend: AttentionBackend, queries: int) -> None:
    q, k, v, v_own = heads(2, 4, 4, queries, 5)
    mask = visible_slots(torch.arange(5 - queries, 5).expand(2, -1), 5)
    _, shared = backend.lead(q, k, v, mask)
    identity = HeadMap.of(range(4), 4)
    assert torch.equal(backend.follow(shared, v_own, None), backend.follow(shared, v_own, identity))


def test_reference_is_the_paper_formula() -> None:
    """P = softmax(q·Kᵀ/√d) row by row in plain loops; the follower's head h uses the leader's head map[h]."""
    q, k, v, v_own = (x.double() for x in heads(1, 4, 2, 3, 3))
    out, weights = REFERENCE.lead(q, k, v, visible_slots(torch.arange(3)[None], 3))
    followed = REFERENCE.follow(weights, v_own, HeadMap.of([3, 2, 1, 0], 2))
    for h in range(4):
        for t in range(3):
            p, p_mapped = (torch.softmax(k[0, head // 2, : t + 1] @ q[0, head, t] / 4.0, dim=0) for head in (h, 3 - h))
            torch.testing.assert_close(out[0, h, t], p @ v[0, h // 2, : t + 1], atol=1e-6, rtol=1e-6)
            torch.testing.assert_close(followed[0, h, t], p_mapped @ v_own[0, h // 2, : t + 1], atol=1e-6, rtol=1e-6)


def test_visible_slots() -> None:
    """Ragged rows see up to their own position; a window looks back so far and no further."""
    rows = visible_slots(torch.tensor([[0, 1], [3, 4]]), 5)
    assert rows is not None
    assert rows.int().tolist() == [[[[1, 0, 0, 0, 0], [1, 1, 0, 0, 0]]], [[[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]]]
    windowed = visible_slots(torch.arange(4)[None], 4, window=2)
    assert windowed is not None
    assert windowed[0, 0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
    assert visible_slots(torch.arange(4)[None], 4, window=4) is None
