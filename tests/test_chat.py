"""chat.py as people use it: every flag, bad input, pipes, and an interactive session on a terminal."""

from __future__ import annotations

import functools
import io
import json
import os
import re
import shutil
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest

import chat
from minisa import LLM, MinisaError, load
from minisa.generation.speculate import PromptLookup
from minisa.text.conversation import Conversation
from tests.commands import FRANCE, Ran
from tests.loadable import loadable_hf
from tests.tiny import tiny_config


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

    def test_the_end_of_an_answer(self, ask: Callable[..., Ran]) -> None:
        whole = ask("--prompt", FRANCE).out
        assert len(ask("--prompt", FRANCE, "--max-new-tokens", 2).out) < len(whole)
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
            "minisa.generation.loop.PromptLookup", lambda *given: lookups.append(1) or PromptLookup(*given)
        )
        flags = ("--prompt", "Say ha 9 times: ha ha ha ha", "--max-new-tokens", 30)
        assert ask(*flags).out == ask(*flags, "--speculate").out
        assert len(lookups) == 1

    def test_raw_continues_the_text(self, ask: Callable[..., Ran]) -> None:
        ran = ask("--raw", "--prompt", "The capital of France is", "--max-new-tokens", 8)
        assert "Paris" in ran.out
        assert ran.out != ask("--prompt", "The capital of France is", "--max-new-tokens", 8).out

    def test_formats_of_numbers(self, ask: Callable[..., Ran]) -> None:
        ran = ask("--prompt", FRANCE, "--dtype", "fp32", "--device", "cpu", "--max-seq-len", 100)
        assert "fp32 on cpu, eager · context 100 · KV cache 4.4 MiB" in ran.err
        ran = ask("--prompt", FRANCE, "--kv-dtype", "fp8")
        assert "KV cache 5.6 MiB in fp8\n" in ran.err and "Paris" in ran.out

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


BAD_FLAGS: dict[str, tuple[list[str], str]] = {
    "unknown model": (["--model", "smolm2-135"], "unknown model 'smolm2-135': did you mean smollm2-135m"),
    "sa backwards": (["--sa", "9-7"], "runs backwards"),
    "layer 0": (["--sa", "0-3"], "layer 0 cannot follow"),
    "temperature": (["--temperature", "-1"], "temperature is -1.0: expected 0 (greedy), or 0.0001 to 10000"),
    "min-p": (["--min-p", "nan"], "min_p is nan"),
    "penalty": (["--repetition-penalty", "0"], "repetition_penalty is 0.0"),
    "max-new-tokens": (["--max-new-tokens", "0"], "max_new_tokens is 0: expected 1 or more"),
    "max-seq-len": (["--max-seq-len", "9000"], "max_seq_len is 9000: expected 1 to 8192"),
    "dtype": (["--dtype", "int3"], "--dtype 'int3' is not supported: expected auto, fp32, bf16, fp16"),
    "device": (["--device", "quantum"], "--device 'quantum' is not a device"),
    "no such flag": (["--colour", "red"], "No such option"),
    "not a number": (["--top-k", "many"], "'many' is not a valid integer"),
    "raw with system": (["--raw", "--system", "x"], "leave out --system"),
    "no such format": (["--chat-format", "vicuna"], "chat_format is 'vicuna': expected one of chatml, llama2"),
    "surrogates": (["--prompt", "\udcff"], "--prompt is not UTF-8"),
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
def test_an_answer_that_fills_the_context(ask: Callable[..., Ran]) -> None:
    """What the footer says is in use is no more than there is: the last token is not fed."""
    ran = ask("--raw", "--prompt", "Once upon a time", "--max-seq-len", 30)
    assert "(the answer filled the context, which --max-seq-len sets)" in ran.err
    assert "context 30/30" in ran.err


@pytest.mark.real_model
@pytest.mark.parametrize(
    ("stdin", "says"), [(b"caf\xe9", "stdin is not UTF-8: byte 3 is 0xe9"), (b"", "stdin is empty")]
)
def test_bad_stdin(ask: Callable[..., Ran], stdin: bytes, says: str) -> None:
    assert_one_line(ask(stdin=stdin), says)


def rename_architecture(file: Path) -> None:
    data = file.read_bytes()
    at = data.index(b"general.architecture") + 32
    assert data[at : at + 5] == b"llama"
    file.write_bytes(data[:at] + b"gemma" + data[at + 5 :])


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (lambda file: os.truncate(file, 50_000_000), "hurt.gguf"),
    "empty": (lambda file: os.truncate(file, 0), "hurt.gguf"),
    "another architecture": (rename_architecture, "'gemma' is not supported: expected 'llama'"),
}


@pytest.mark.real_model
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_copy_of_the_default_model(
    damage: str, run_chat: Callable[..., Ran], smollm2_path: Path, tmp_path: Path
) -> None:
    file = Path(shutil.copy(smollm2_path, tmp_path / "hurt.gguf"))
    harm, says = DAMAGES[damage]
    harm(file)
    assert_one_line(run_chat("--model", file, "--prompt", "hi"), says)


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


MISTAKES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "architecture": (
        lambda folder: change_config(folder, architectures=["Qwen2ForCausalLM"]),
        "['Qwen2ForCausalLM'] are not supported",
    ),
    "rope scaling": (
        lambda folder: change_config(folder, rope_parameters={"rope_type": "longrope", "factor": 2.0}),
        "'longrope' is not supported",
    ),
    "no JSON": (lambda folder: (folder / "config.json").write_bytes(b"{"), "config.json"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors"),
    "cut off": (lambda folder: os.truncate(folder / "model.safetensors", 5000), "model.safetensors"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_checkpoint_with_a_mistake(mistake: str, run_chat: Callable[..., Ran], tmp_path: Path) -> None:
    loadable_hf(tmp_path, tiny_config(vocab_size=512))
    harm, says = MISTAKES[mistake]
    harm(tmp_path)
    assert_one_line(run_chat("--model", tmp_path, "--prompt", "hi"), says)


def test_a_model_without_a_chat_template(run_chat: Callable[..., Ran], tmp_path: Path) -> None:
    """As Meta publishes Llama 2 Chat: said once, and mended by a flag."""
    model = loadable_hf(tmp_path, tiny_config(vocab_size=512))
    flags = ("--model", model, "--device", "cpu", "--max-new-tokens", 2, "--prompt", "hello")
    warning = "(no chat template: texts go in one after the other; --chat-format names a format)"
    assert warning in run_chat(*flags).err
    assert warning not in run_chat(*flags, "--raw").err
    assert warning not in run_chat(*flags, "--chat-format", "chatml").err


class TestAnotherPlan:
    """/sa PLAN, with a tiny model."""

    @pytest.fixture
    def session(self, tmp_path: Path) -> chat.Session:
        model = str(loadable_hf(tmp_path, tiny_config(vocab_size=512)))
        llm = chat.open_model(model, device="cpu")
        return chat.Session(llm, model, {"device": "cpu"}, {"max_new_tokens": 2}, True, Conversation())

    def test_one_model_at_a_time(self, session: chat.Session, monkeypatch: pytest.MonkeyPatch) -> None:
        opened, alive = [weakref.ref(session.llm)], []

        def open_model(*given: Any, **options: Any) -> LLM:
            alive.append(sum(llm() is not None for llm in opened))
            llm = load(*given, **options)
            opened.append(weakref.ref(llm))
            return llm

        monkeypatch.setattr(chat, "open_model", open_model)
        for plan in ("0:1-2", "none", "2:3"):
            list(session.send("hello"))
            chat.command(session, f"/sa {plan}")
            assert str(session.llm.plan) == plan
        assert alive == [0, 0, 0]

    @pytest.mark.parametrize("failure", [KeyboardInterrupt, MinisaError("no memory")], ids=["Ctrl-C", "error"])
    def test_one_that_cannot_be_loaded(
        self, failure: Any, session: chat.Session, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The one before comes back; if not even that can be loaded, the session ends."""
        failures = [failure]

        def open_model(*given: Any, **options: Any) -> LLM:
            if failures:
                raise failures.pop()
            return load(*given, **options)

        monkeypatch.setattr(chat, "open_model", open_model)
        with pytest.raises((KeyboardInterrupt, MinisaError)):
            chat.command(session, "/sa 1")
        assert list(session.send("hello"))
        assert not session.llm.plan.followers
        failures = [failure, failure]
        with pytest.raises(click.ClickException):
            chat.command(session, "/sa 1")


class TestConversation:
    def send(self, conversation: Conversation, text: str, context: int, longest: int | None = None) -> list[str]:
        """What is sent, where a token is a word."""
        messages = conversation.messages_for(
            text, lambda messages: sum(len(m["content"].split()) for m in messages), context, longest
        )
        conversation.add_answer(messages, f"answer to {text}")
        return [message["content"] for message in messages]

    def test_the_oldest_turns_are_dropped_when_the_context_is_full(self) -> None:
        conversation = Conversation("be brief")
        assert self.send(conversation, "a", 16) == ["be brief", "a"]
        assert self.send(conversation, "b", 16) == ["be brief", "a", "answer to a", "b"]
        assert self.send(conversation, "c", 16) == ["be brief", "a", "answer to a", "b", "answer to b", "c"]
        assert conversation.forgotten == 0
        assert self.send(conversation, "d", 16) == ["be brief", "b", "answer to b", "c", "answer to c", "d"]
        assert conversation.forgotten == 2
        assert self.send(conversation, "e " * 99, 16) == ["be brief", "e " * 99]
        assert conversation.forgotten == 6

    def test_no_more_room_is_made_than_the_answer_may_take(self) -> None:
        conversation = Conversation()
        for text in "abc":
            self.send(conversation, text, 16, 1)
        assert self.send(conversation, "d", 16, 1)[0] == "a"
        assert self.send(conversation, "e", 16)[0] == "c"

    def test_reset(self) -> None:
        conversation = Conversation("be brief")
        self.send(conversation, "a", 16)
        conversation.reset(None)
        assert self.send(conversation, "b", 16) == ["b"]
