"""chat.py as people use it: every flag, bad input, pipes, and an interactive session on a terminal."""

from __future__ import annotations

import errno
import functools
import io
import json
import os
import pickle
import re
import shutil
import struct
import sys
import weakref
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest

import chat
from minisa import LLM, MinisaError, console, load
from minisa.generation.speculate import PromptLookup
from minisa.text.conversation import Conversation
from tests.commands import FRANCE, Ran
from tests.loadable import loadable_hf
from tests.tiny import random_weights, tiny_config, write_hf


@pytest.fixture
def run_chat(run_main: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ran]:
    """run_chat(*flags, stdin=...): chat.py's main in this process, as the command line runs it."""

    def run(*flags: object, stdin: bytes = b"") -> Ran:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        return run_main(chat.main, "chat.py", *flags)

    return run


open_once = functools.lru_cache(2)(chat.open_model)


def open_again(*given: Any, **options: Any) -> LLM:
    llm = open_once(*given, **options)
    llm.cache.tokens[0].clear()  # as where it has just been loaded
    return llm


@pytest.fixture
def ask(smollm2_path: Path, run_chat: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ran]:
    """run_chat on the default model, greedy, in a short context; a model that was loaded before is taken again."""
    monkeypatch.setattr(chat, "open_model", open_again)

    def run(*flags: object, **options: Any) -> Ran:
        return run_chat("--max-seq-len", 512, "--temperature", 0, *flags, **options)

    return run


@pytest.mark.real_model
class TestAnswers:
    def test_prompt_flag_prints_the_answer_alone_on_stdout(self, ask: Callable[..., Ran]) -> None:
        ran = ask("--prompt", FRANCE)
        assert (ran.status, "Paris" in ran.out, ran.out.count("\n")) == (0, True, 1)
        assert "30 layers, plain attention · bf16 on cpu, C++ step" in ran.err
        assert re.search(r"\[[\d.]+ tokens/s · first token [\d.]+ s · context \d+/512 · KV [\d.]+ MiB\]", ran.err)

    def test_piped_stdin_is_the_prompt(self, ask: Callable[..., Ran]) -> None:
        assert ask(stdin=f"{FRANCE}\n".encode()).out == ask("--prompt", FRANCE).out

    @pytest.mark.parametrize("sa", [["--sa"], ["--sa", "3:6,19:21,25:27,28:29"]], ids=["default", "spans"])
    def test_sa(self, ask: Callable[..., Ran], sa: list[str]) -> None:
        ran = ask("--prompt", FRANCE, *sa)
        assert "Paris" in ran.out
        assert "4 follow (3:6,19:21,25:27,28:29)" in ran.err

    def test_sa_takes_a_plan_file(self, ask: Callable[..., Ran], tmp_path: Path) -> None:
        plan = tmp_path / "plan.json"
        plan.write_text(json.dumps({"version": 1, "n_layers": 30, "followers": {"21": {"leader": 19}}}))
        assert "1 follow (19:21)" in ask("--prompt", FRANCE, "--sa", plan).err

    def test_system(self, ask: Callable[..., Ran]) -> None:
        flags = ("--prompt", "Who are you?", "--max-new-tokens", 30)
        assert ask(*flags, "--system", "You are a pirate called Jack.").out != ask(*flags).out

    def test_max_new_tokens(self, ask: Callable[..., Ran]) -> None:
        assert len(ask("--prompt", FRANCE, "--max-new-tokens", 2).out) < len(ask("--prompt", FRANCE).out)

    def test_stop(self, ask: Callable[..., Ran]) -> None:
        whole = ask("--prompt", FRANCE).out
        assert ask("--prompt", FRANCE, "--stop", "Paris", "--stop", "never").out == whole[: whole.index("Paris")] + "\n"

    def test_sampling_flags_change_the_text_and_a_seed_fixes_it(self, ask: Callable[..., Ran]) -> None:
        story = ("--prompt", "Tell me a story.", "--max-new-tokens", 24)
        hot = (*story, "--temperature", 3, "--seed", 1)
        texts = {
            "greedy": ask(*story).out,
            "hot": ask(*hot).out,
            "seed": ask(*story, "--temperature", 3, "--seed", 2).out,
            "penalty": ask(*story, "--repetition-penalty", 5).out,
        }
        assert len(set(texts.values())) == 4
        assert ask(*hot).out == texts["hot"]
        for flag, value in (("--top-k", 1), ("--top-p", 1e-6), ("--min-p", 1)):  # each leaves the likeliest token only
            assert ask(*hot, flag, value).out == texts["greedy"]

    def test_speculate_guesses_and_gives_the_same_answer(
        self, ask: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        lookups = []
        monkeypatch.setattr(
            "minisa.generation.generate.PromptLookup", lambda *given: lookups.append(1) or PromptLookup(*given)
        )
        flags = ("--prompt", "Say ha 9 times: ha ha ha ha", "--max-new-tokens", 30)
        assert ask(*flags).out == ask(*flags, "--speculate").out
        assert len(lookups) == 1

    def test_raw_continues_the_text(self, ask: Callable[..., Ran]) -> None:
        ran = ask("--raw", "--prompt", "The capital of France is", "--max-new-tokens", 8)
        assert "Paris" in ran.out
        assert ran.out != ask("--prompt", "The capital of France is", "--max-new-tokens", 8).out

    def test_dtype_device_and_context(self, ask: Callable[..., Ran]) -> None:
        ran = ask("--prompt", FRANCE, "--dtype", "fp32", "--device", "cpu", "--max-seq-len", 100)
        assert "fp32 on cpu, eager · context 100 · KV cache 4.4 MiB" in ran.err

    def test_kv_dtype(self, ask: Callable[..., Ran]) -> None:
        plain, narrow = ask("--prompt", FRANCE), ask("--prompt", FRANCE, "--kv-dtype", "fp8")
        assert "KV cache 11.2 MiB\n" in plain.err
        assert "KV cache 5.6 MiB in fp8\n" in narrow.err
        assert "Paris" in narrow.out

    def test_compile_and_no_compile(self, ask: Callable[..., Ran]) -> None:
        flags = ("--prompt", FRANCE, "--dtype", "bf16")
        compiled, eager = ask(*flags, "--compile"), ask(*flags, "--no-compile")
        assert "bf16 on cpu, C++ step" in compiled.err
        assert "bf16 on cpu, eager" in eager.err
        assert "Paris" in compiled.out
        assert "Paris" in eager.out

    @pytest.mark.parametrize("format", ["int8", "int4"])
    def test_quantize(self, ask: Callable[..., Ran], format: str) -> None:
        ran = ask("--prompt", "Name a colour.", "--quantize", format, "--max-new-tokens", 12)
        assert f"{format} on cpu" in ran.err
        assert ran.out.strip()

    def test_model_takes_a_path(self, run_chat: Callable[..., Ran], smollm2_path: Path, tmp_path: Path) -> None:
        shutil.copy(smollm2_path, tmp_path / "renamed.gguf")  # nothing is guessed from the name
        ran = run_chat("--model", tmp_path / "renamed.gguf", "--prompt", FRANCE, "--temperature", 0)
        assert "Paris" in ran.out


BAD_FLAGS: dict[str, tuple[list[str], str]] = {
    "unknown model": (["--model", "smolm2-135"], "unknown model 'smolm2-135': did you mean smollm2-135m"),
    "missing path": (["--model", "./no/such/place"], "no/such/place"),
    "sa backwards": (["--sa", "9-7"], "runs backwards"),
    "layer 0": (["--sa", "0-3"], "layer 0 cannot follow"),
    "layer too high": (["--sa", "27-30"], "layer 30 is outside the model, whose layers are 0 to 29"),
    "not spans": (["--sa", "abc"], "'abc' is not a span"),
    "missing plan": (["--sa", "nowhere.json"], "nowhere.json: cannot read the plan"),
    "temperature": (["--temperature", "-1"], "temperature is -1.0: expected 0 (greedy), or 0.0001 to 10000"),
    "top-k": (["--top-k", "-3"], "top_k is -3"),
    "top-p": (["--top-p", "1.5"], "top_p is 1.5: expected 0.000001 to 1 (off)"),
    "min-p": (["--min-p", "nan"], "min_p is nan"),
    "penalty": (["--repetition-penalty", "0"], "repetition_penalty is 0.0"),
    "max-new-tokens": (["--max-new-tokens", "0"], "max_new_tokens is 0: expected 1 or more"),
    "max-seq-len": (["--max-seq-len", "9000"], "max_seq_len is 9000: expected 1 to 8192"),
    "dtype": (["--dtype", "int3"], "--dtype 'int3' is not supported: expected auto, fp32, bf16, fp16"),
    "device": (["--device", "quantum"], "--device 'quantum' is not a device"),
    "no such flag": (["--colour", "red"], "No such option"),
    "not a number": (["--top-k", "many"], "'many' is not a valid integer"),
    "raw with system": (["--raw", "--system", "x"], "leave out --system"),
    "raw with a format": (["--raw", "--chat-format", "llama2"], "leave out --chat-format"),
    "no such format": (["--chat-format", "vicuna"], "chat_format is 'vicuna': expected one of chatml, llama2"),
    "surrogates": (["--prompt", "\udcff"], "--prompt is not UTF-8"),
    "surrogates in a stop string": (["--stop", "a", "--stop", "caf\udce9"], "--stop is not UTF-8 at character 3"),
    "empty prompt": (["--prompt", " "], "--prompt is empty"),
}


def assert_one_line(ran: Ran, says: str) -> None:
    assert ran.status == 2
    assert ran.out == ""
    complaint = ran.err.splitlines()[-1]
    assert complaint.startswith("chat.py: ")
    assert says in complaint
    assert "Traceback" not in ran.err
    before = [line for line in ran.err.splitlines()[:-1] if "KV cache" not in line]  # the banner may come first
    assert before == []


@pytest.mark.real_model
@pytest.mark.parametrize("case", BAD_FLAGS)
def test_bad_flags_get_one_line_and_status_2(case: str, run_chat: Callable[..., Ran], smollm2_path: Path) -> None:
    flags, says = BAD_FLAGS[case]
    ran = run_chat(*([] if "--prompt" in flags else ["--prompt", "hi"]), *flags)
    assert_one_line(ran, says)
    assert "KV cache" not in ran.err  # nobody waits for a model to hear it


@pytest.mark.real_model
def test_cuda_asked_for_and_absent(
    run_chat: Callable[..., Ran], smollm2_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    ran = run_chat("--prompt", "hi", "--device", "cuda")
    assert_one_line(ran, "--device cuda: torch has no cuda devices here")


@pytest.mark.real_model
def test_an_answer_that_fills_the_context(ask: Callable[..., Ran]) -> None:
    """What the footer says is in use is no more than there is: the last token is not fed."""
    ran = ask("--raw", "--prompt", "Once upon a time", "--max-seq-len", 30)
    assert "(the answer filled the context, which --max-seq-len sets)" in ran.err
    assert "context 30/30" in ran.err


@pytest.mark.real_model
def test_prompt_longer_than_the_context(ask: Callable[..., Ran]) -> None:
    assert_one_line(ask("--prompt", "word " * 600), "tokens long, the context 512")


@pytest.mark.real_model
@pytest.mark.parametrize(
    ("stdin", "says"), [(b"caf\xe9", "stdin is not UTF-8: byte 3 is 0xe9"), (b"", "stdin is empty")]
)
def test_bad_stdin(ask: Callable[..., Ran], stdin: bytes, says: str) -> None:
    assert_one_line(ask(stdin=stdin), says)


@pytest.mark.real_model
class TestDamagedWeights:
    """A copy of the default model's file, hurt in one place."""

    @pytest.fixture
    def hurt(self, smollm2_path: Path, tmp_path: Path) -> Path:
        return Path(shutil.copy(smollm2_path, tmp_path / "hurt.gguf"))

    def test_truncated(self, run_chat: Callable[..., Ran], hurt: Path) -> None:
        os.truncate(hurt, 50_000_000)
        assert_one_line(run_chat("--model", hurt, "--prompt", "hi"), "hurt.gguf")

    def test_empty(self, run_chat: Callable[..., Ran], hurt: Path) -> None:
        os.truncate(hurt, 0)
        assert_one_line(run_chat("--model", hurt, "--prompt", "hi"), "hurt.gguf")

    def test_absurd_counts(self, run_chat: Callable[..., Ran], hurt: Path) -> None:
        with hurt.open("r+b") as file:
            file.seek(8)
            file.write(struct.pack("<QQ", 1 << 60, 1 << 60))
        assert_one_line(run_chat("--model", hurt, "--prompt", "hi"), "hurt.gguf")

    def test_another_architecture_is_named(self, run_chat: Callable[..., Ran], hurt: Path) -> None:
        data = hurt.read_bytes()
        at = data.index(b"general.architecture") + 20
        assert data[at + 12 : at + 17] == b"llama"
        hurt.write_bytes(data[: at + 12] + b"gemma" + data[at + 17 :])
        assert_one_line(run_chat("--model", hurt, "--prompt", "hi"), "'gemma' is not supported: expected 'llama'")


class TestBadCheckpoints:
    """Tiny Hugging Face checkpoints with one lie each; no network, no real model."""

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        config = tiny_config()
        write_hf(tmp_path, config, random_weights(config, 0))
        return tmp_path

    def change_config(self, folder: Path, **changes: object) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    def run(self, run_chat: Callable[..., Ran], folder: Path, says: str) -> None:
        assert_one_line(run_chat("--model", folder, "--prompt", "hi"), says)

    def test_architecture(self, run_chat: Callable[..., Ran], folder: Path) -> None:
        self.change_config(folder, architectures=["Qwen2ForCausalLM"])
        self.run(run_chat, folder, "Qwen2ForCausalLM is not supported")

    def test_rope_scaling(self, run_chat: Callable[..., Ran], folder: Path) -> None:
        self.change_config(folder, rope_parameters={"rope_type": "longrope", "factor": 2.0})
        self.run(run_chat, folder, "rope_scaling type 'longrope' is not supported")

    def test_config_is_not_json(self, run_chat: Callable[..., Ran], folder: Path) -> None:
        (folder / "config.json").write_bytes(b"{")
        self.run(run_chat, folder, "config.json")

    def test_no_tokenizer(self, run_chat: Callable[..., Ran], folder: Path) -> None:
        self.run(run_chat, folder, "no tokenizer, so no text: give token ids")

    def test_weights_missing(self, run_chat: Callable[..., Ran], folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        self.run(run_chat, folder, str(folder))

    def test_offsets_that_leave_the_file(self, run_chat: Callable[..., Ran], folder: Path) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
        self.run(run_chat, folder, "model.safetensors")

    def test_a_pickle_that_carries_code_is_refused_unrun(self, run_chat: Callable[..., Ran], tmp_path: Path) -> None:
        flag = tmp_path / "executed"

        class Bomb:
            def __reduce__(self) -> tuple[Any, ...]:
                return (os.mkdir, (str(flag),))

        params = {"dim": 64, "n_layers": 2, "n_heads": 4, "vocab_size": 256, "multiple_of": 32, "norm_eps": 1e-5}
        (tmp_path / "params.json").write_text(json.dumps(params))
        with zipfile.ZipFile(tmp_path / "consolidated.00.pth", "w") as archive:
            archive.writestr("consolidated/data.pkl", pickle.dumps(Bomb(), protocol=2))
            archive.writestr("consolidated/version", "3\n")
            archive.writestr("consolidated/byteorder", "little")
        self.run(run_chat, tmp_path, "consolidated.00.pth")
        assert not flag.exists()


def test_a_model_without_a_chat_template(run_chat: Callable[..., Ran], tmp_path: Path) -> None:
    """As Meta publishes Llama 2 Chat: said once, and mended by a flag."""
    model = loadable_hf(tmp_path, tiny_config(vocab_size=512))
    flags = ("--model", model, "--device", "cpu", "--max-new-tokens", 2, "--prompt", "hello")
    warning = "(no chat template: texts go in one after the other; --chat-format names a format)"
    assert warning in run_chat(*flags).err
    assert warning not in run_chat(*flags, "--raw").err
    assert warning not in run_chat(*flags, "--chat-format", "chatml").err
    llm = load(model, device="cpu", chat_format="chatml")
    assert llm.chat_template.name == "chatml"
    for wrong in ("vicuna", ["chatml"]):
        with pytest.raises(MinisaError, match=r"chat_format is .*: expected one of chatml, llama2"):
            load(model, device="cpu", chat_format=wrong)  # type: ignore[arg-type]


class TestAnotherPlan:
    """/sa PLAN, with a tiny model."""

    @pytest.fixture
    def conversation(self, tmp_path: Path) -> Conversation:
        self.model = str(loadable_hf(tmp_path, tiny_config(vocab_size=512)))
        return Conversation(chat.open_model(self.model, device="cpu"), raw=True, max_new_tokens=2)

    def test_one_model_at_a_time(self, conversation: Conversation, monkeypatch: pytest.MonkeyPatch) -> None:
        opened = [weakref.ref(conversation.llm)]
        alive = []

        def open_model(*given: Any, **options: Any) -> LLM:
            alive.append(sum(llm() is not None for llm in opened))
            llm = load(*given, **options)
            opened.append(weakref.ref(llm))
            return llm

        monkeypatch.setattr(chat, "open_model", open_model)
        for plan in ("0:1-2", "none", "2:3"):
            list(conversation.send("hello"))
            chat.command(conversation, f"/sa {plan}", self.model, {"device": "cpu"})
            assert str(conversation.llm.plan) == plan
        assert alive == [0, 0, 0]

    @pytest.mark.parametrize("failure", [KeyboardInterrupt, MinisaError("no memory")], ids=["Ctrl-C", "error"])
    def test_one_that_cannot_be_loaded(
        self, failure: Any, conversation: Conversation, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The one before comes back; if not even that can be loaded, the session ends."""
        failures = [failure]

        def open_model(*given: Any, **options: Any) -> LLM:
            if failures:
                raise failures.pop()
            return load(*given, **options)

        monkeypatch.setattr(chat, "open_model", open_model)
        with pytest.raises((KeyboardInterrupt, MinisaError)):
            chat.command(conversation, "/sa 1", self.model, {"device": "cpu"})
        assert list(conversation.send("hello"))
        assert not conversation.llm.plan.followers
        failures = [failure, failure]
        with pytest.raises(click.ClickException):
            chat.command(conversation, "/sa 1", self.model, {"device": "cpu"})


@pytest.mark.real_model
def test_no_space_on_disk_while_fetching(
    run_chat: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "model.part")

    monkeypatch.setenv("MINISA_WEIGHTS", str(tmp_path))
    monkeypatch.setattr(console, "pull", full)
    ran = run_chat("--prompt", "hi")
    assert ran.status == 2
    assert "no space left on the disk" in ran.err.splitlines()[-1]
    assert "98 MB, licence Apache-2.0" in ran.err.splitlines()[0]  # said before anything is fetched
