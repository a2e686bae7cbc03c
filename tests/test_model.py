"""The Transformer: one answer however it is fed, and a slow independent model that agrees with it."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from minisa.cache import StaticCache
from minisa.config import RopeScaling
from minisa.costs import parameter_count
from minisa.errors import MinisaError
from minisa.model import Transformer
from minisa.rope import rope_frequencies
from minisa.runners import eager as decode
from minisa.runners.eager import TorchRunner, prefill_chunks
from minisa.sharing import SharingPlan
from tests.models import N_LAYERS, PLANS, SIX_LAYERS, build_model, in_one_go, random_tokens
from tests.tiny import random_weights, tiny_config


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("batch", [1, 4])
def test_torch_backend_equals_reference(plan: SharingPlan, batch: int) -> None:
    tokens = random_tokens(SIX_LAYERS, batch, 40)
    expected = in_one_go(build_model(SIX_LAYERS, plan, "reference"), tokens)
    assert (in_one_go(build_model(SIX_LAYERS, plan), tokens) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_identity_plans_equal_no_plan_to_the_bit(backend: str) -> None:
    tokens = random_tokens(SIX_LAYERS, 2, 30)
    plain = in_one_go(build_model(SIX_LAYERS, SharingPlan.none(N_LAYERS), backend), tokens)
    assert torch.equal(plain, in_one_go(build_model(SIX_LAYERS, SharingPlan.following(N_LAYERS, {}), backend), tokens))
    shared = in_one_go(build_model(SIX_LAYERS, PLANS["span"], backend), tokens)
    assert not torch.equal(plain, shared)
    identity = SharingPlan.following(N_LAYERS, {2: 1, 3: 1, 4: 1}, {layer: range(4) for layer in (2, 3, 4)})
    assert torch.equal(shared, in_one_go(build_model(SIX_LAYERS, identity, backend), tokens))


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_steps_equal_chunks_equal_one_go(plan: SharingPlan, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model(SIX_LAYERS, plan, backend)
    tokens = random_tokens(SIX_LAYERS, 1, 50)
    expected = in_one_go(model, tokens)

    monkeypatch.setattr(decode, "PREFILL_CHUNK", 16)
    cache = StaticCache.allocate(SIX_LAYERS, plan, max_seq_len=128)
    chunks = list(prefill_chunks(model, tokens[:, :33], 0, cache)) + list(
        prefill_chunks(model, tokens[:, 33:], 33, cache)
    )
    assert [chunk.shape[1] for chunk in chunks] == [16, 16, 1, 16, 1]
    assert (model.head(torch.cat(chunks, 1)) - expected).abs().max() < 1e-4

    runner, cache = TorchRunner(model), StaticCache.allocate(SIX_LAYERS, plan, max_seq_len=50)
    steps = [runner.decode(tokens[:, i], torch.tensor([i]), cache, i + 1) for i in range(50)]
    assert (torch.stack(steps, 1) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_ragged_rows_decode_as_if_alone(plan: SharingPlan) -> None:
    """Four rows of different lengths, prefilled one by one and decoded together, against each row in one go."""
    model = build_model(SIX_LAYERS, plan)
    tokens, prompts, steps = random_tokens(SIX_LAYERS, 4, 50), (1, 7, 20, 33), 12
    cache = StaticCache.allocate(SIX_LAYERS, plan, batch=4, max_seq_len=64)
    cache.values.fill_(9.0)  # what an earlier text may have left must not be seen
    cache.keys.fill_(9.0)
    for row, length in enumerate(prompts):
        list(prefill_chunks(model, tokens[row : row + 1, :length], 0, cache.view(rows=slice(row, row + 1))))
    positions, runner = torch.tensor(prompts), TorchRunner(model)
    for _ in range(steps):
        logits = runner.decode(tokens[range(4), positions], positions, cache, int(positions.max()) + 1)
        for row, position in enumerate(positions.tolist()):
            alone = in_one_go(model, tokens[row : row + 1, : position + 1])[0, -1]
            assert (logits[row] - alone).abs().max() < 1e-4
        positions = positions + 1


@pytest.mark.parametrize("window", [1, 5, 16])
@pytest.mark.parametrize("plan", ["none", "head maps"])
def test_sliding_window_in_chunks_and_steps(window: int, plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(n_layers=N_LAYERS, n_heads=4, n_kv_heads=2, max_seq_len=128, sliding_window=window)
    tokens = random_tokens(config, 1, 40)
    expected = in_one_go(build_model(config, PLANS[plan], "reference"), tokens)
    assert not torch.allclose(expected, in_one_go(build_model(SIX_LAYERS, PLANS[plan], "reference"), tokens), atol=1e-3)
    monkeypatch.setattr(decode, "PREFILL_CHUNK", 7)
    model, cache = build_model(config, PLANS[plan]), StaticCache.allocate(config, PLANS[plan], max_seq_len=40)
    chunked = torch.cat(list(prefill_chunks(model, tokens[:, :30], 0, cache)), 1)
    assert (model.head(chunked) - expected[:, :30]).abs().max() < 1e-4
    for i in range(30, 40):
        step = TorchRunner(model).decode(tokens[:, i], torch.tensor([i]), cache, i + 1)
        assert (step - expected[:, i]).abs().max() < 1e-4


def test_against_a_model_written_out_in_loops() -> None:
    """Every tensor by name, one position and one head at a time, in float64: nothing shared with minisa's code."""
    config, plan = tiny_config(n_layers=3, n_heads=4, n_kv_heads=2), SharingPlan.following(3, {2: 1}, {2: [2, 2, 0, 1]})
    w = {name: tensor.double() for name, tensor in random_weights(config, 0).items()}
    tokens = random_tokens(config, 1, 9)[0]
    half, group = config.head_dim // 2, config.n_heads // config.n_kv_heads

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.pow(2).mean() + config.norm_eps).sqrt() * weight

    def turn(x: Tensor, position: int) -> Tensor:
        out = x.clone()
        for i in range(half):
            angle = torch.tensor(position * config.rope_theta ** (-2 * i / config.head_dim), dtype=torch.float64)
            out[i] = x[i] * angle.cos() - x[i + half] * angle.sin()
            out[i + half] = x[i + half] * angle.cos() + x[i] * angle.sin()
        return out

    xs = [w["tok_embeddings.weight"][token] for token in tokens]
    patterns: dict[tuple[int, int, int], Tensor] = {}  # (layer, head, position) → attention weights
    for i in range(3):
        at = f"layers.{i}."
        normed = [norm(x, w[at + "attention_norm.weight"]) for x in xs]
        heads = {
            name: [(w[f"{at}attention.{name}.weight"] @ x).view(-1, config.head_dim) for x in normed]
            for name in ("wq", "wk", "wv")
        }
        for t in range(9):
            mixed = []
            for h in range(config.n_heads):
                if plan.sources[i] == i:
                    q = turn(heads["wq"][t][h], t)
                    scores = [q @ turn(heads["wk"][s][h // group], s) / config.head_dim**0.5 for s in range(t + 1)]
                    patterns[i, h, t] = torch.stack(scores).softmax(0)
                head_map = plan.head_maps[i] or range(config.n_heads)
                p = patterns[plan.sources[i], head_map[h], t]
                mixed.append(sum(p[s] * heads["wv"][s][h // group] for s in range(t + 1)))
            x = xs[t] + w[at + "attention.wo.weight"] @ torch.cat(mixed)
            normed_x = norm(x, w[at + "ffn_norm.weight"])
            gate, up = (w[f"{at}feed_forward.{name}.weight"] @ normed_x for name in ("w1", "w3"))
            xs[t] = x + w[at + "feed_forward.w2.weight"] @ (gate / (1 + (-gate).exp()) * up)
    output = w["tok_embeddings.weight"] if config.tie_embeddings else w["output.weight"]
    expected = torch.stack([output @ norm(x, w["norm.weight"]) for x in xs])
    for backend in ("reference", "torch"):
        assert (in_one_go(build_model(config, plan, backend), tokens[None])[0] - expected).abs().max() < 1e-4


def test_followers_have_no_queries_or_keys_and_the_count_says_so() -> None:
    for plan, tied in itertools.product(PLANS.values(), (False, True)):
        config = tiny_config(n_layers=N_LAYERS, n_heads=4, n_kv_heads=2, tie_embeddings=tied)
        model = build_model(config, plan)
        assert sum(p.numel() for p in model.parameters()) == parameter_count(config, plan)
        for layer in range(N_LAYERS):
            has = {f"layers.{layer}.attention.{name}.weight" in model.state_dict() for name in ("wq", "wk")}
            assert has == {layer in plan.leaders}


def test_prefill_of_a_follower_never_holds_a_square_matrix() -> None:
    """The fused path: no tensor as large as T×T appears for any layer, follower with a head map included."""
    model, length = (
        build_model(tiny_config(n_layers=N_LAYERS, n_heads=4, n_kv_heads=2, max_seq_len=4096), PLANS["head maps"]),
        2048,
    )
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            for out in result if isinstance(result, tuple | list) else [result]:
                if isinstance(out, Tensor):
                    largest = max(largest, out.numel())
            return result

    cache = StaticCache.allocate(model.config, model.plan, max_seq_len=length)
    with Watch():
        for _ in prefill_chunks(model, random_tokens(model.config, 1, length), 0, cache):
            pass
    assert largest <= decode.PREFILL_CHUNK * length  # a chunk's mask, once and not a head


@pytest.mark.parametrize("plan", ["none", "head maps"])
def test_masks_are_floats_a_few_rows_at_a_time(plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = random_tokens(SIX_LAYERS, 1, 40)
    expected = in_one_go(build_model(SIX_LAYERS, PLANS[plan], "reference"), tokens)
    cache, model = StaticCache.allocate(SIX_LAYERS, PLANS[plan], max_seq_len=40), build_model(SIX_LAYERS, PLANS[plan])
    monkeypatch.setattr("minisa.attention.MAX_MASK_ELEMENTS", 100)
    hidden = [next(prefill_chunks(model, tokens[:, part], part.start, cache)) for part in (slice(0, 9), slice(9, 40))]
    assert (model.head(torch.cat(hidden, 1)) - expected).abs().max() < 1e-4


def test_half_precision_cast_of_the_rotary_table_is_refused() -> None:
    model = build_model(SIX_LAYERS, PLANS["none"]).bfloat16()
    with pytest.raises(TypeError, match="rope_frequencies must stay fp32"):
        in_one_go(model, random_tokens(SIX_LAYERS, 1, 3))


def test_rope_scalings_against_hand_computed_values() -> None:
    """Llama 3.1: wavelengths over 8192 / 1 divided by 8, under 8192 / 4 kept, linear in turns between."""
    base = {"head_dim": 128, "rope_theta": 500_000.0}
    plain = rope_frequencies(tiny_config(**base))
    scaled = rope_frequencies(tiny_config(**base, rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)))
    turns = 8192 * plain / (2 * torch.pi)
    assert torch.equal(scaled[turns > 4], plain[turns > 4])
    assert torch.allclose(scaled[turns < 1], plain[turns < 1] / 8)
    between = (turns > 1) & (turns < 4)
    assert between.any()
    smooth = (turns[between] - 1) / 3
    assert torch.allclose(scaled[between], (1 - smooth) * plain[between] / 8 + smooth * plain[between])
    assert torch.allclose(rope_frequencies(tiny_config(**base, rope_scaling=RopeScaling("linear", 4.0))), plain / 4)
    factors = tuple(float(i + 1) for i in range(64))
    by_factors = rope_frequencies(tiny_config(**base, rope_scaling=RopeScaling("factors", factors=factors)))
    assert torch.allclose(by_factors, plain / torch.arange(1, 65))
    with torch.device("meta"):  # as models are built; the factors of a GGUF file must stay real
        scaled_model = Transformer(
            tiny_config(n_layers=N_LAYERS, **base, rope_scaling=RopeScaling("factors", factors=factors)), PLANS["none"]
        )
    assert torch.allclose(scaled_model.rope_frequencies, by_factors)
    with pytest.raises(MinisaError, match="has 3 factors"):
        rope_frequencies(tiny_config(**base, rope_scaling=RopeScaling("factors", factors=(1.0, 1.0, 1.0))))
