"""Talk to a model: `python chat.py`, or `python chat.py --prompt TEXT` for one answer on stdout."""

from __future__ import annotations

from minisa.interrupts import end_without_traceback

if __name__ == "__main__":
    end_without_traceback()

import atexit
import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from minisa.console import model_options, open_model, run
from minisa.costs import kv_bytes
from minisa.errors import MinisaError
from minisa.generation.options import Options
from minisa.models.registry import choose_plan, resolve
from minisa.text.chat import FORMATS

if TYPE_CHECKING:
    from minisa import LLM
    from minisa.generation.row import Chunk, Stats
    from minisa.text.conversation import Conversation

try:
    import readline
except ImportError:  # some builds of Python have none; then lines cannot be edited
    readline = None  # type: ignore[assignment]

HELP = """\
/reset         forget the conversation
/system TEXT   set the system prompt and start over; without TEXT, remove it
/sa PLAN       load the model anew with this plan: spans, "default", "none" or a .json file; alone, show the plan
/stats         how the last answer went
/help          this list
Ctrl-C stops an answer and keeps the session, Ctrl-D leaves."""
# A terminal is shown these in place of control characters: what a model says must not command it.
VISIBLE = dict.fromkeys({*range(0x20), *range(0x7F, 0xA0)} - set(b"\n\t"), "\N{REPLACEMENT CHARACTER}")


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
    "--repetition-penalty", type=float, default=1.1, show_default=True, help="Above 1 discourages repeats; 1 is off."
)
@click.option("--seed", type=int, help="Same seed, same text.")
@click.option("--stop", multiple=True, help="End the answer at this text; may be given several times.")
@click.option(
    "--speculate",
    is_flag=True,
    help="Guess ahead: the same text (in bf16 on a GPU but for near ties), faster if it repeats.",
)
@click.option("--max-seq-len", type=int, help="Context in tokens; the model's own by default.")
@click.option("--compile/--no-compile", default=None, help="The compiled step, or eager PyTorch; else the faster one.")
@click.option("--chat-format", help=f"In place of the model's own: {', '.join(FORMATS)}, or a .jinja file.")
@click.option("--raw", is_flag=True, help="No chat format: continue the text as it stands.")
def main(model: str, prompt: str | None, system: str | None, raw: bool, **flags: Any) -> None:
    """Chat with a Llama or Mistral model, with or without Shared Attention.

    Without --prompt and with a terminal on stdin the session is interactive; text piped into stdin is one prompt.
    """
    if prompt is None and not sys.stdin.isatty():
        prompt = read_stdin()
    elif prompt is not None and not prompt.strip():
        raise MinisaError("--prompt is empty: give some text")
    for name, text in (("--prompt", prompt), ("--system", system), *(("--stop", text) for text in flags["stop"])):
        check_utf8(name, text or "")
    for name, given in (("--system", system), ("--chat-format", flags["chat_format"])):
        if raw and given:
            raise MinisaError(f"--raw continues the text as it stands: leave out {name}")
    options = {option.name: flags.pop(option.name) for option in fields(Options) if option.name in flags}

    from minisa.text.conversation import Conversation

    Options(**options)  # what is out of range is refused before a model loads
    llm = open_model(model, **flags)
    session = Session(llm, model, flags, options, raw, Conversation(system))
    click.echo(session.banner(), err=True)
    if not raw and llm.chat_template.name == "raw":
        click.echo("(no chat template: texts go in one after the other; --chat-format names a format)", err=True)
    if prompt is not None:
        answer(session, prompt)
    else:
        converse(session)


@dataclass
class Session:
    """A model and what has been said. loading: how the model was loaded; options: those of `LLM.generate`.

    raw: no chat format and no memory; each text is continued as it stands.
    """

    llm: LLM
    model: str
    loading: dict[str, Any]
    options: dict[str, Any]
    raw: bool
    conversation: Conversation
    last: Stats | None = field(default=None, init=False)

    def send(self, text: str) -> Iterator[Chunk]:
        """Stream the answer. It becomes a turn as far as it was given out, also when the caller stops early."""
        self.last = None
        if self.raw:
            for chunk in self.llm.generate(text, **self.options):
                self.last = chunk.stats
                yield chunk
            return
        length, max_new_tokens = self.llm.cache.length, self.options.get("max_new_tokens")
        ids = self.llm.chat_template.ids
        messages = self.conversation.messages_for(text, lambda them: len(ids(them)), length, max_new_tokens)
        said = ""
        try:
            for chunk in self.llm.chat(messages, **self.options):
                said += chunk.text
                self.last = chunk.stats
                yield chunk
        finally:
            if said:
                self.conversation.add_answer(messages, said)

    def banner(self) -> str:
        """One line: the model, its plan, where it runs."""
        from minisa.device import dtype_name

        llm, plan, cache = self.llm, self.llm.plan, self.llm.cache
        kept = "" if cache.values.dtype == llm.dtype else f" in {dtype_name(cache.values.dtype)}"
        sharing = f"{len(plan.followers)} follow ({plan})" if plan.followers else "plain attention"
        return (
            f"{Path(self.model).name} · {llm.config.n_layers} layers, {sharing} · "
            f"{llm.weight_format} on {llm.device}, {llm.runner.name} · "
            f"context {cache.length} · KV cache {mebibytes(cache.bytes())}{kept}"
        )

    def footer(self) -> str:
        """Tokens/s, time to first token, context used, KV bytes in use."""
        llm, stats = self.llm, self.last
        assert stats is not None
        used = stats.prompt_tokens + stats.new_tokens - 1  # the last token was not fed
        held = kv_bytes(llm.config, llm.plan, used, llm.cache.values.itemsize)
        return (
            f"[{stats.tokens_per_second:.1f} tokens/s · first token {stats.time_to_first_token:.2f} s · "
            f"context {used}/{llm.cache.length} · KV {mebibytes(held)}]"
        )

    def stats(self) -> str:
        """What /stats shows."""
        if (stats := self.last) is None:
            return "no answer yet, or the last one was stopped"
        return (
            f"prompt   {stats.prompt_tokens} tokens, {stats.reused_tokens} of them in the cache already, "
            f"the rest at {stats.prompt_tokens_per_second:,.0f} tokens/s\n"
            f"answer   {stats.new_tokens} tokens at {stats.tokens_per_second:.1f} tokens/s, "
            f"the first after {stats.time_to_first_token:.2f} s\n"
            f"memory   peak {mebibytes(stats.peak_memory)}, KV cache {mebibytes(self.llm.cache.bytes())} allocated"
        )

    def change_plan(self, sa: str) -> None:
        """Load the model anew, in the memory of the one before. Where that fails, the plan stays as it was."""
        before = self.llm.plan
        plan = choose_plan(sa, self.llm.config, resolve(self.model)[1])
        del self.llm
        try:
            self.llm = open_model(self.model, **self.loading | {"sa": plan})
        except (KeyboardInterrupt, MinisaError):
            try:
                self.llm = open_model(self.model, **self.loading | {"sa": before})
            except (KeyboardInterrupt, MinisaError) as error:  # there is nobody left to talk to
                raise click.ClickException(str(error) or "interrupted") from None
            raise


def answer(session: Session, text: str) -> None:
    """Print one answer on stdout as it comes, and the footer on stderr."""
    visible = VISIBLE if sys.stdout.isatty() else {}
    reason = None
    try:
        with contextlib.closing(session.send(text)) as chunks:  # type: ignore[type-var]
            for chunk in chunks:
                click.echo(chunk.text.translate(visible), nl=False)
                reason = chunk.finish_reason
    except KeyboardInterrupt:
        click.echo()
        raise
    click.echo()
    if forgotten := session.conversation.forgotten:
        click.echo(f"(the context is full: the {forgotten} oldest messages were dropped)", err=True)
    if reason == "context":
        click.echo("(the answer filled the context, which --max-seq-len sets)", err=True)
    click.secho(session.footer(), dim=True, err=True)


def converse(session: Session) -> None:
    """The interactive session."""
    sys.stdin.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]  # for check_utf8 to tell
    click.echo("/help lists the commands; Ctrl-C stops an answer, Ctrl-D leaves.", err=True)
    keep_history(Path(click.get_app_dir("minisa")) / "history")
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
            check_utf8("the message", line)
            if line.startswith("/"):
                command(session, line)
            elif line.strip():
                answer(session, line)
        except MinisaError as error:
            click.echo(f"({error})", err=True)
        except KeyboardInterrupt:
            click.echo("(stopped)", err=True)


def command(session: Session, line: str) -> None:
    """One of the slash commands of HELP."""
    name, _, rest = line.strip().partition(" ")
    rest, conversation, plan = rest.strip(), session.conversation, session.llm.plan
    if name == "/reset":
        conversation.reset(conversation.system)
    elif name == "/system":
        conversation.reset(rest or None)
    elif name == "/sa" and rest:
        session.change_plan(rest)
        click.echo(session.banner(), err=True)
    elif name == "/sa":
        click.echo(f"plan {plan}\n{plan.picture()}", err=True)
    elif name == "/stats":
        click.echo(session.stats(), err=True)
    elif name == "/help":
        click.echo(HELP, err=True)
    else:
        raise MinisaError(f"{name} is not a command; /help lists them")


def ask() -> str:
    if sys.stdout.isatty():
        return input("> ")
    click.echo("> ", nl=False, err=True)  # stdout carries answers only
    return input()


def keep_history(path: Path) -> None:
    """Lines are kept from session to session, where the home folder allows it."""
    if readline is None:
        return
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        readline.read_history_file(path)
        readline.set_history_length(1000)
        atexit.register(readline.write_history_file, path)


def read_stdin() -> str:
    try:
        text = sys.stdin.buffer.read().decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise MinisaError(f"stdin is not UTF-8: byte {error.start} is {error.object[error.start]:#04x}") from error
    if not text.strip():
        raise MinisaError("stdin is empty: give some text")
    return text


def check_utf8(name: str, text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise MinisaError(f"{name} is not UTF-8 at character {error.start}") from error


def mebibytes(n_bytes: float) -> str:
    return f"{n_bytes / 2**20:,.1f} MiB"


if __name__ == "__main__":
    run(main)
