"""What the command lines share: flags, one-line errors, progress bars, and the default model fetched on first use."""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import json
import math
import os
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import click

from minisa.checkpoint.layouts import BESIDE_THE_WEIGHTS
from minisa.device import DTYPES, KV_DTYPES, dtype_name, is_out_of_memory
from minisa.engine import LLM, load
from minisa.errors import MinisaError
from minisa.files import write_whole
from minisa.interrupts import raise_interrupts
from minisa.models.download import pull
from minisa.models.registry import DEFAULT_MODEL, ModelEntry, find, local_path, weights_dir
from minisa.quantize import QUANTIZATIONS

MODEL = click.option(
    "--model", default=DEFAULT_MODEL, show_default=True, help="Name from weights/models.toml, or a path."
)
DEVICE = click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:N or mps.")
KV_DTYPE = click.option(
    "--kv-dtype", default="auto", show_default=True, help=f"Of keys and values: auto, {', '.join(KV_DTYPES)}."
)
WEIGHTS_OPTIONS = [
    MODEL,
    DEVICE,
    click.option("--dtype", default="auto", show_default=True, help=f"auto, {', '.join(DTYPES)}."),
    click.option("--quantize", type=click.Choice(QUANTIZATIONS), help="Weights in 8 or 4 bits, in blocks of 32."),
]
SHARING_OPTIONS = [
    click.option(
        "--sa",
        is_flag=False,
        flag_value="default",
        metavar="[SPANS|PLAN.json]",
        help="Share attention weights: followers as 27-30 or 3:6,19:21, a plan's file, or alone for the model's own.",
    ),
    KV_DTYPE,
]
WEIGHTS_SUFFIXES = (".safetensors", ".bin", ".gguf", ".pth", ".model")
LONGEST_NAME = 200  # of 255 bytes: what is kept beside the file adds to its name, and so does a file half written


class OutputFile(click.Path):
    """The name of a file to write, refused before any work if it is empty, too long, of no file, in no folder, in one
    that cannot be written to, a checkpoint's, or without the suffix."""

    def __init__(self, suffix: str = "") -> None:
        super().__init__(dir_okay=False)
        self.suffix = suffix

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        path = os.fsdecode(super().convert(value, param, ctx))
        if not path or (os.path.exists(path) and not os.path.isfile(path)):
            self.fail(f"{path!r}: expected the name of a file", param, ctx)
        if len(os.fsencode(os.path.basename(path))) > LONGEST_NAME:
            self.fail(f"{path}: expected a name of at most {LONGEST_NAME} bytes", param, ctx)
        if not os.path.isdir(os.path.dirname(os.path.abspath(path))):
            self.fail(f"{path}: there is no such folder", param, ctx)
        if not os.access(os.path.dirname(os.path.abspath(path)), os.R_OK | os.W_OK):
            self.fail(f"{path}: the folder cannot be read and written to", param, ctx)
        if _is_of_a_checkpoint(Path(path)):
            self.fail(f"{path}: is for a file of the checkpoint there: expected another name", param, ctx)
        if self.suffix and Path(path).suffix != self.suffix:
            self.fail(f"{path}: expected a name that ends in {self.suffix}", param, ctx)
        return path


def _is_of_a_checkpoint(path: Path) -> bool:
    """Whether a file to write would take the place of weights, or of what describes those beside it."""
    if path.suffix in WEIGHTS_SUFFIXES and path.exists():
        return True
    described = (*BESIDE_THE_WEIGHTS, "*.index.json")
    return any(fnmatch.fnmatchcase(path.name, pattern) for pattern in described) and any(
        file.suffix in WEIGHTS_SUFFIXES and not file.name.endswith(".delta.safetensors")
        for file in path.absolute().parent.iterdir()
    )


class Finite(click.FloatRange):
    """A number of a range, which click's own takes infinity and NaN for."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number", param, ctx)
        return number


def keep_apart(written: Mapping[str, str | Path | None], *read: tuple[str, str | None]) -> None:
    """MinisaError where a flag names a file to be written that another flag, of (flag, path), reads or writes too."""
    flags: dict[str, str] = {}
    for flag, path in written.items():
        if path is not None and (other := flags.setdefault(os.path.realpath(path), flag)) != flag:
            raise MinisaError(f"{flag} {path}: {other} names the same file: give another")
    for flag, path in read:
        if path is not None and os.path.realpath(path) in flags:
            raise MinisaError(f"{flag} {path}: {flags[os.path.realpath(path)]} names the same file: give another")


Command = TypeVar("Command", bound=Callable[..., Any])


def weights_options(command: Command) -> Command:
    """Decorator: --model --device --dtype --quantize."""
    for option in reversed(WEIGHTS_OPTIONS):
        command = option(command)
    return command


def model_options(command: Command) -> Command:
    """Decorator: the weights_options, --sa and --kv-dtype."""
    for option in reversed(SHARING_OPTIONS):
        command = option(command)
    return weights_options(command)


def run(command: click.Command) -> NoReturn:
    """Run a command line; what the user can put right is one line on stderr and exit status 2."""
    name = Path(sys.argv[0]).name
    if name == "__main__.py":
        name = "python -m minisa"
    for stream in ("stdout", "stderr"):
        if getattr(sys, stream) is None:  # it was closed before we began
            setattr(sys, stream, open(os.devnull, "w"))  # noqa: SIM115
    signal.signal(signal.SIGTERM, _end)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # not under nohup
        signal.signal(signal.SIGHUP, _end)
    with contextlib.suppress(AttributeError):  # a stream that is closed, or somebody else's
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]  # a character that it has not is a "?"
    try:
        raise_interrupts()
        status = command.main(prog_name=name, standalone_mode=False, help_option_names=["-h", "--help"])
    except (MinisaError, click.ClickException) as error:
        _fail(name, error.format_message() if isinstance(error, click.ClickException) else str(error))
    except (KeyboardInterrupt, click.Abort):
        click.echo(err=True)
        sys.exit(130)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        _fail(name, "the device is out of memory: take a shorter context, a smaller --dtype or another --device")
    except BrokenPipeError:  # the reader has left
        sys.exit(1)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            _fail(name, f"no space left on the disk while writing {error.filename or 'the output'}")
        _fail(name, f"{error.filename or 'input or output'}: {error.strerror or error}")
    finally:
        try:
            sys.stdout.flush()
        except OSError:  # the interpreter would try once more on its way out, and complain
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(status if isinstance(status, int) else 0)


def _end(signum: int, _: object) -> NoReturn:
    """What is at work tidies up: children end, and half-written and temporary files go."""
    sys.exit(128 + signum)


def _fail(name: str, message: str) -> NoReturn:
    click.echo(f"{name}: {' '.join(message.split())}", err=True)
    sys.exit(2)


def open_model(model: str, **options: Any) -> LLM:
    """`minisa.load` with a progress bar; the default model is fetched first if it is not there yet."""
    fetch_default(model)
    with _Bar(f"loading {model}") as bar:
        return load(model, progress=bar.update, **options)


def fetch_default(model: str) -> None:
    """Fetch the default model, if that is the one meant and it is not here yet."""
    if model == DEFAULT_MODEL and local_path(find(model)) is None:
        fetch(find(model))


def fetch(entry: ModelEntry) -> Path:
    """Download a model's files, saying what, how large, under which licence and where to."""
    click.echo(
        f"{entry.name}: {entry.size / 1e6:,.0f} MB, licence {entry.licence}, from {entry.source} to {weights_dir()}",
        err=True,
    )
    bars: dict[str, _Bar] = {}

    def show(file: str, done: int, total: int | None) -> None:
        if file not in bars:
            bars[file] = _Bar(file)
            if total is None:  # nothing that a bar could show
                click.echo(file, err=True)
        bars[file].update(done, total)

    try:
        return pull(entry, progress=show)
    finally:
        for bar in bars.values():
            bar.close()


def write_json(path: str, record: Mapping[str, Any]) -> None:
    """What --json asks for. MinisaError where it cannot be written: then the record is the last line on stdout."""
    try:
        write_whole(Path(path), json.dumps(record, indent=1) + "\n")
    except OSError as error:
        click.echo(json.dumps(record))
        raise MinisaError(f"--json {path}: {error.strerror}") from error


def banner(llm: LLM, model: str) -> str:
    """One line: the model, its plan, where it runs."""
    config, plan = llm.config, llm.plan
    kept = "" if llm.cache.values.dtype == llm.dtype else f" in {dtype_name(llm.cache.values.dtype)}"
    sharing = f"{len(plan.followers)} follow ({plan})" if plan.followers else "plain attention"
    return (
        f"{Path(model).name} · {config.n_layers} layers, {sharing} · "
        f"{llm.weight_format} on {llm.device}, {llm.runner.name} · "
        f"context {llm.cache.length} · KV cache {mebibytes(llm.cache.bytes())}{kept}"
    )


def mebibytes(n_bytes: float) -> str:
    return f"{n_bytes / 2**20:,.1f} MiB"


class _Bar:
    """click's progress bar, begun when the first total is known; silent where stderr is not a terminal."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._bar: Any = None
        self._done = 0

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def update(self, done: int, total: int | None) -> None:
        if not sys.stderr.isatty() or not total:
            return
        if self._bar is None:
            self._bar = click.progressbar(length=total, label=self._label, file=sys.stderr, show_pos=False)
            self._bar.__enter__()
        self._bar.update(done - self._done)
        self._done = done

    def close(self) -> None:
        if self._bar is not None:
            self._bar.__exit__(None, None, None)
            self._bar = None
