"""Steps recorded and replayed. Where there is no GPU the recording is a stand-in that runs the body again: what a graph
needs (memory that stays, nothing on the host that changes) holds or fails just the same."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason='needs pip install "minisa[test]", on Linux')

from minisa.cache import StaticCache
from minisa.generation.sampling import Chooser
from minisa.model import Transformer
from minisa.quantize import Format, quantize, replace_matrix
from minisa.runners.eager import TorchRunner, compile_layers
from minisa.runners.graphs import AHEAD, GraphRunner
from minisa.runners.kernels.decode_attention import MAX_QUERIES
from minisa.runners.kernels.quantized_product import use_kernels
from tests.engines import DEVICE, PROMPTS, Recorder, byte_llm, graph_llm, llm_of, text_of, tokens_of
from tests.models import PLANS, SIX_LAYERS, build_model
from tests.rings import CONTEXT, SLOTS, WINDOWED, WINDOWED_PLANS, windowed_llm

SAMPLED = {"temperature": 0.8, "seed": 5, "top_k": 40, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.3}


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.mark.parametrize("options", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("plan", ["none", "interleaved", "head maps"])
def test_the_same_text_as_eager(plan: str, options: dict[str, Any], recorder: Recorder) -> None:
    options = options | {"max_new_tokens": 12}
    plain, graphs = llm_of(PLANS[plan]), graph_llm(recorder, PLANS[plan])
    for prompt in ("x", "a second, longer prompt"):
        assert text_of(graphs.generate(prompt, **options)) == text_of(plain.generate(prompt, **options))
    assert recorder.recorded == 1  # another length, the same graph


def test_with_the_kernels(recorder: Recorder) -> None:
    options = {"max_new_tokens": 4, "stop_ids": [7, 70, 170]}
    plain, graphs = llm_of(), graph_llm(recorder, backend="kernels")
    found = list(graphs.generate(PROMPTS[:3], **options))
    for row, prompt in enumerate(PROMPTS[:3]):
        assert tokens_of(found, row) == tokens_of(plain.generate(prompt, **options))


def test_rows_of_a_batch_are_rows_alone_whatever_fills_the_bucket(recorder: Recorder) -> None:
    """Three prompts in a bucket of four; rows end at different times; a batch after it, in the other rows' leavings."""
    plain, graphs = llm_of(), graph_llm(recorder)
    options = SAMPLED | {"max_new_tokens": 14, "stop_ids": [7, 70, 170]}
    for prompts in (PROMPTS[:3], [PROMPTS[2]], PROMPTS[1:]):
        found = list(graphs.generate(prompts, **options))
        for row, prompt in enumerate(prompts):
            assert tokens_of(found, row) == tokens_of(plain.generate(prompt, **options))
    assert recorder.recorded == 2  # a bucket of four and one of one


def test_one_graph_for_each_number_of_rows_and_way_of_sampling(recorder: Recorder) -> None:
    llm = graph_llm(recorder)
    for options in ({}, {"temperature": 1.0, "seed": 1}, {"temperature": 1.0, "seed": 2}, {}):
        list(llm.generate("x", max_new_tokens=3, **options))
    assert recorder.recorded == 2


def test_the_context_s_end_and_the_cache_that_was_kept(recorder: Recorder) -> None:
    """Warming up writes to slots: neither a prompt that fills the context nor a conversation may notice."""
    plain, graphs = llm_of(max_seq_len=24), graph_llm(recorder, max_seq_len=24)
    for prompt in ("y" * 24, "y" * 20, "y" * 24, "y" * 23 + "z"):
        expected, found = list(plain.generate(prompt)), list(graphs.generate(prompt))
        assert tokens_of(found) == tokens_of(expected)
        assert found[-1].finish_reason == "context"
        assert found[-1].stats is not None and expected[-1].stats is not None
        assert found[-1].stats.reused_tokens == expected[-1].stats.reused_tokens
    found = list(graphs.generate(["y" * 24, "x"]))  # one row ends at once, the other goes on
    assert len(tokens_of(found, 0)) == 1
    assert tokens_of(found, 1) == tokens_of(plain.generate("x"))


@pytest.mark.parametrize("backend", ["torch", "kernels"])
def test_a_ring_decodes_the_tokens_of_a_full_cache(backend: str, recorder: Recorder) -> None:
    """Warming up leaves alone what the ring's window holds; then round and round, other rows at other places."""
    ring = graph_llm(recorder, WINDOWED_PLANS["head maps"], CONTEXT, backend, WINDOWED)
    prompts, options = (
        ["y" * (SLOTS - 2), "z" * (CONTEXT - 1 - SLOTS + 4), "x"],
        {"max_new_tokens": 9 if backend == "torch" else 3},
    )
    found = list(ring.generate(prompts, **options))
    for row, prompt in enumerate(prompts):
        assert tokens_of(found, row) == tokens_of(windowed_llm(ring=False).generate(prompt, **options))
    for prompt in ("w" * (CONTEXT - 9), "w" * CONTEXT) if backend == "torch" else ():
        assert tokens_of(ring.generate(prompt)) == tokens_of(windowed_llm(ring=False).generate(prompt))


@pytest.mark.parametrize("plan", ["none", "head maps"])
@pytest.mark.parametrize(
    "options",
    [{"repetition_penalty": 0.5}, {"temperature": 0.7, "seed": 1, "repetition_penalty": 0.1}],
    ids=["greedy", "sampled"],
)
def test_guesses_are_verified_in_one_graph(
    options: dict[str, Any], plan: str, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the end of the context, whose last slots are too few for it. A penalty below 1 drives the text in circles."""
    llm = graph_llm(recorder, PLANS[plan])
    confirmed: list[int] = []
    confirm = Chooser.confirm

    def spy(choose: Chooser, logits: torch.Tensor, *rest: Any) -> list[int]:
        assert len(logits) == AHEAD <= MAX_QUERIES
        tokens = confirm(choose, logits, *rest)
        confirmed.append(len(tokens))
        return tokens

    monkeypatch.setattr(Chooser, "confirm", spy)
    for prompt in ("to be or not to be or not to be or", "y" * 24):
        found = tokens_of(llm.generate(prompt, speculate=True, **options))
        assert found == tokens_of(llm_of(PLANS[plan]).generate(prompt, **options))
    assert min(confirmed) < AHEAD == max(confirmed)  # wrong ones and right ones
    assert recorder.recorded == 2  # steps and guesses


def test_a_ring_is_not_guessed_ahead_of(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a graph that would take many times a step."""
    ring = graph_llm(recorder, WINDOWED_PLANS["head maps"], CONTEXT, config=WINDOWED)
    monkeypatch.setattr(ring.runner, "verify", lambda *_: pytest.fail("guessed"))
    prompt = "to be or not to be or " * 3
    found = tokens_of(ring.generate(prompt, speculate=True, max_new_tokens=20))
    assert found == tokens_of(windowed_llm(ring=False).generate(prompt, max_new_tokens=20))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_gpu_that_is_not_the_current_one() -> None:
    plan, device = PLANS["head maps"], torch.device("cuda:1")
    cache = StaticCache.allocate(SIX_LAYERS, plan, max_seq_len=96, device=device)
    llm = byte_llm(build_model(SIX_LAYERS, plan, "kernels").to(device), cache)
    found = tokens_of(llm.generate("x", max_new_tokens=12))
    assert torch.cuda.current_device() == 0
    assert found == tokens_of(llm_of(plan).generate("x", max_new_tokens=12))


def test_another_cache_gets_a_graph_of_its_own(recorder: Recorder) -> None:
    llm = graph_llm(recorder)
    first = text_of(llm.generate("one", max_new_tokens=6))
    llm.cache = StaticCache.allocate(SIX_LAYERS, llm.plan, batch=2, max_seq_len=64, device=DEVICE)
    llm.cache.tokens[0].clear()
    assert text_of(llm.generate("one", max_new_tokens=6)) == first
    assert recorder.recorded == 2


def quantize_model(model: Transformer, format: Format) -> None:
    for name, weight in list(model.named_parameters()):
        if weight.ndim == 2:
            of_name = "int8" if name.startswith("tok_") else format
            replace_matrix(model, name, quantize(weight, of_name), torch.float32)


def compare_compiled_with_eager(quantized: Format | None) -> None:
    llm = graph_llm(Recorder())
    if quantized:
        quantize_model(llm.model, quantized)
    expected = text_of(llm.generate("compiled", max_new_tokens=4))  # dequantized
    use_kernels(llm.model)
    llm.runner = GraphRunner(llm.model, record=Recorder())
    llm.cache.tokens[0].clear()
    assert text_of(llm.generate("compiled", max_new_tokens=4)) == expected
    if DEVICE.type == "cpu":  # on a GPU prompts are compiled too
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 4


@pytest.mark.parametrize("quantized", [None, "int4"])
def test_compiled_layers_inside(quantized: Format | None) -> None:
    """The same text as the layers uncompiled; quantized products stay one operation of Triton's within them. (With int4
    the head is int8.)

    In a process of its own: torch.compile imports setuptools, which clashes with what pytest has imported.
    """
    script = f"from tests.test_graphs import compare_compiled_with_eager as compare; compare({quantized!r})"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[1])


def compare_prompts_compiled_with_eager() -> None:
    plan = PLANS["head maps"]
    models = [build_model(SIX_LAYERS, plan) for _ in range(2)]
    for model in models:
        quantize_model(model, "int4")
    compile = torch.compile
    with pytest.MonkeyPatch.context() as patch:  # Dynamo traces as ever; C++ in place of what it found takes minutes
        patch.setattr(torch, "compile", lambda function, options=None, **how: compile(function, backend="eager", **how))
        compile_layers(models[0], on_gpu=True)
    runners = [TorchRunner(model) for model in models]
    counts = []
    for length in (24, 2, 40, 7, 3):
        tokens = torch.randint(250, (1, length))
        caches = [StaticCache.allocate(SIX_LAYERS, plan, max_seq_len=96) for _ in models]
        with torch.inference_mode():
            pairs = [runner.verify(tokens, 0, cache) for runner, cache in zip(runners, caches, strict=True)]
        torch.testing.assert_close(*pairs)
        counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert counts[0] > 0 and len(set(counts)) == 1
    layer = weakref.ref(models[0].layers[0])
    gc.disable()
    del model, models, runners
    assert layer() is None


def test_prompts_compiled_once_for_any_length() -> None:
    """As on a GPU, a quantized head too; and when the model is gone, so are its weights."""
    script = "from tests.test_graphs import compare_prompts_compiled_with_eager as compare; compare()"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[1])
