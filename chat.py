"""Talk to a model: `python chat.py`, or `python chat.py --prompt TEXT` for one answer on stdout."""

from __future__ import annotations

import contextlib
import os
import readline
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from minisa.interrupts import end_without_traceback

if __name__ == "__main__":
    end_without_traceback()
    # Threads of PyTorch's that spin while they wait take turns with the C++ step's compiler: on two cores an answer
    # would take eight times as long beside it.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from minisa import MinisaError
from minisa.console import banner, mebibytes, model_options, open_model, run
from minisa.costs import kv_bytes
from minisa.generation.options import Options
from minisa.models.registry import choose_plan, resolve
from minisa.text.chat import FORMATS
from minisa.text.conversation import Conversation

HELP = """\
/reset         forget the conversation
/system TEXT   set the system prompt and start over; without TEXT, remove it
/sa PLAN       load the model anew with this plan: spans, "default", "none" or a .json file; alone, show the plan
/stats         how the last answer went
/help          this list
Ctrl-C stops an answer and keeps the session, Ctrl-D leaves."""
PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {0x7F: 0x2421}
PICTURES |= dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


@click.command()
@model_options
@click.option("--prompt", help="Answer this once, on stdout, and exit.")
@click.option("--system", help="System prompt.")
@click.option("--max-new-tokens", type=int, default=1024, show_default=True, help="Longest answer.")
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 takes the likeliest token.")
@click.option("--top-k", type=int, default=0, show_default=True, help="Keep the k most likely tokens; 0 is off.")
@click.option("--top-p", type=float, default=1.0, show_default=True, help="Keep the likeliest tokens up to this sum.")
@click.option("--min-p", type=float, default=0.0, show_default=True, help="Keep tokens this likely beside the best.")
@click.option(
    "--repetition-penalty",
    type=float,
    default=1.1,
    show_default=True,
    help="Above 1 discourages repeats; 1 is off.",
)
@click.option("--seed", type=int, help="Same seed, same text.")
@click.option("--stop", multiple=True, help="End the answer at this text; may be given several times.")
@click.option(
    "--speculate",
    is_flag=True,
    help="Guess ahead: the same text (in bf16 on a GPU but for near ties), faster if it repeats.",
)
@click.option("--max-seq-len", type=int, help="Context in tokens; the model's own by default.")
@click.option("--compile/--no-compile", "compiled", default=None, help="Wait for the compiled step, or do without it.")
@click.option("--chat-format", help=f"In place of the model's own: {', '.join(FORMATS)}, or a .jinja file.")
@click.option("--raw", is_flag=True, help="No chat format: continue the text as it stands.")
def main(
    model: str,
    sa: str | None,
    device: str,
    dtype: str,
    kv_dtype: str,
    quantize: str | None,
    prompt: str | None,
    system: str | None,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    repetition_penalty: float,
    seed: int | None,
    stop: tuple[str, ...],
    speculate: bool,
    max_seq_len: int | None,
    compiled: bool | None,
    chat_format: str | None,
    raw: bool,
) -> None:
    """Chat with a Llama or Mistral model, with or without Shared Attention.

    Without --prompt and with a terminal on stdin the session is interactive; text piped into stdin is one prompt.
    """
    prompt, system = as_utf8(prompt), as_utf8(system)
    if prompt is not None:
        check_text("--prompt", prompt)
    elif sys.stdin is None or not sys.stdin.isatty():
        prompt = read_stdin()
        check_text("stdin", prompt)
    stop = tuple(as_utf8(text) or "" for text in stop)
    for text in stop:
        check_utf8("--stop", text)
    if raw and system:
        raise MinisaError("--raw continues the text as it stands: leave out --system")
    if raw and chat_format:
        raise MinisaError("--raw continues the text as it stands: leave out --chat-format")
    sampling: dict[str, Any] = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
    }
    Options(**sampling, max_new_tokens=max_new_tokens, stop=stop)  # what is out of range is told before a model loads
    options = {"max_new_tokens": max_new_tokens, "stop": stop, "speculate": speculate}
    loading = {
        "device": device,
        "dtype": dtype,
        "kv_dtype": kv_dtype,
        "quantize": quantize,
        "max_seq_len": max_seq_len,
        "compile": compiled,
        "chat_format": chat_format,
    }
    conversation = Conversation(open_model(model, sa=sa, **loading), system, raw, **sampling, **options)
    click.echo(banner(conversation.llm, model), err=True)
    if not raw and conversation.llm.chat_template.name == "raw":
        click.echo("(no chat template: texts go in one after the other; --chat-format names a format)", err=True)
    if prompt is not None:
        answer(conversation, prompt)
    else:
        converse(conversation, model, loading)


def answer(conversation: Conversation, text: str) -> None:
    """Print one answer on stdout as it comes, and the footer on stderr.

    A terminal is shown pictures of control characters: what a model says must not command it.
    """
    pictures = PICTURES if sys.stdout.isatty() else {}
    reason = None
    try:
        with contextlib.closing(conversation.send(text)) as chunks:
            for chunk in chunks:
                click.echo(chunk.text.translate(pictures), nl=False)
                reason = chunk.finish_reason
    except KeyboardInterrupt:
        click.echo()
        raise
    click.echo()
    if conversation.forgotten:
        click.echo(f"(the context is full: the {conversation.forgotten} oldest messages were dropped)", err=True)
    if reason == "context":
        click.echo("(the answer filled the context, which --max-seq-len sets)", err=True)
    click.secho(footer(conversation), dim=True, err=True)


def footer(conversation: Conversation) -> str:
    """tokens/s, time to first token, context used, KV bytes in use."""
    llm, stats = conversation.llm, conversation.last
    assert stats is not None
    used = stats.prompt_tokens + stats.new_tokens - 1  # the last token was not fed
    held = kv_bytes(llm.config, llm.plan, used, llm.cache.values.itemsize)
    return (
        f"[{stats.tokens_per_second:.1f} tokens/s · first token {stats.time_to_first_token:.2f} s · "
        f"context {used}/{llm.cache.length} · KV {mebibytes(held)}]"
    )


def converse(conversation: Conversation, model: str, loading: dict[str, Any]) -> None:
    """The interactive session."""
    sys.stdin.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]  # for check_text to tell
    click.echo("/help lists the commands; Ctrl-C stops an answer, Ctrl-D leaves.", err=True)
    with history(Path(click.get_app_dir("minisa")) / "history"):
        while True:
            try:
                line = ask()
            except EOFError:
                click.echo(err=True)
                return
            except KeyboardInterrupt:
                click.echo(err=True)
                continue
            try:
                if line.strip():
                    check_text("the message", line)
                    if line.startswith("/"):
                        command(conversation, line, model, loading)
                    else:
                        answer(conversation, line)
            except MinisaError as error:
                click.echo(f"({error})", err=True)
            except KeyboardInterrupt:
                click.echo("(stopped)", err=True)


def command(conversation: Conversation, line: str, model: str, loading: dict[str, Any]) -> None:
    """One of the slash commands of HELP."""
    name, _, rest = line.strip().partition(" ")
    rest = rest.strip()
    if name == "/reset":
        conversation.reset(conversation.system)
    elif name == "/system":
        conversation.reset(rest or None)
    elif name == "/sa" and rest:
        change_plan(conversation, rest, model, loading)
        click.echo(banner(conversation.llm, model), err=True)
    elif name == "/sa":
        click.echo(f"plan {conversation.llm.plan}\n{conversation.llm.plan.picture()}", err=True)
    elif name == "/stats":
        click.echo(stats_report(conversation), err=True)
    elif name == "/help":
        click.echo(HELP, err=True)
    else:
        raise MinisaError(f"{name} is not a command; /help lists them")


def change_plan(conversation: Conversation, sa: str, model: str, loading: dict[str, Any]) -> None:
    """Load the model anew, in the memory of the one before. Where that fails, the plan stays as it was."""
    before = conversation.llm.plan
    plan = choose_plan(sa, conversation.llm.config, resolve(model)[1])
    del conversation.llm
    try:
        conversation.llm = open_model(model, sa=plan, **loading)
    except (KeyboardInterrupt, MinisaError) as failure:
        try:
            conversation.llm = open_model(model, sa=before, **loading)
        except (KeyboardInterrupt, MinisaError) as error:  # there is nobody left to talk to
            raise click.ClickException(str(error) or "interrupted") from None
        raise failure


def stats_report(conversation: Conversation) -> str:
    stats = conversation.last
    if stats is None:
        return "no answer yet, or the last one was stopped"
    return (
        f"prompt   {stats.prompt_tokens} tokens, {stats.reused_tokens} of them in the cache already, "
        f"the rest at {stats.prompt_tokens_per_second:,.0f} tokens/s\n"
        f"answer   {stats.new_tokens} tokens at {stats.tokens_per_second:.1f} tokens/s, "
        f"the first after {stats.time_to_first_token:.2f} s\n"
        f"memory   peak {mebibytes(stats.peak_memory)}, KV cache {mebibytes(conversation.llm.cache.bytes())} allocated"
    )


def ask() -> str:
    if sys.stdout.isatty():
        return input("> ")
    click.echo("> ", nl=False, err=True)  # stdout carries answers only
    return input()


@contextlib.contextmanager
def history(path: Path) -> Iterator[None]:
    """Line history kept from session to session, where the home folder allows it."""
    with contextlib.suppress(OSError):
        readline.read_history_file(path)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            readline.set_history_length(1000)
            readline.write_history_file(path)


def read_stdin() -> str:
    if sys.stdin is None:
        raise MinisaError("stdin is closed: give --prompt TEXT")
    try:
        return sys.stdin.buffer.read().decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise MinisaError(f"stdin is not UTF-8: byte {error.start} is {error.object[error.start]:#04x}") from error


def as_utf8(argument: str | None) -> str | None:
    """A flag's text, if the terminal speaks UTF-8 and the locale has been told otherwise."""
    try:
        return None if argument is None else os.fsencode(argument).decode("utf-8")
    except UnicodeError:
        return argument


def check_text(name: str, text: str) -> None:
    if not text.strip():
        raise MinisaError(f"{name} is empty: give some text")
    check_utf8(name, text)


def check_utf8(name: str, text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise MinisaError(f"{name} is not UTF-8 at character {error.start}") from error


if __name__ == "__main__":
    run(main)
