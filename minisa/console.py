"""What the command lines share: flags, one-line errors, progress bars; without PyTorch, so that --help is quick."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

from minisa.errors import MinisaError
from minisa.files import write_whole
from minisa.interrupts import raise_interrupts
from minisa.models.download import pull
from minisa.models.registry import DEFAULT_MODEL, ModelEntry, find, local_path, weights_dir

if TYPE_CHECKING:
    from minisa.engine import LLM

MODEL = click.option("--model", default=DEFAULT_MODEL, show_default=True, help="Name in weights/models.toml, or path.")
DEVICE = click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:N or mps.")
DTYPE = click.option("--dtype", default="auto", show_default=True, help="auto, fp32, bf16 or fp16.")
KV_DTYPE = click.option("--kv-dtype", default="auto", show_default=True, help="Of keys and values: as --dtype, or fp8.")
QUANTIZE = click.option("--quantize", type=click.Choice(("int8", "int4")), help="Weights in blocks of 32.")
SHARING = click.option(
    "--sa",
    is_flag=False,
    flag_value="default",
    metavar="[SPANS|PLAN.json]",
    help="Share attention weights: followers as 27-30 or 3:6,19:21, a plan's file, or alone for the model's own.",
)
Command = TypeVar("Command", bound=Callable[..., Any])


def weights_options(command: Command) -> Command:
    """Decorator: --model --device --dtype --quantize."""
    return MODEL(DEVICE(DTYPE(QUANTIZE(command))))


def model_options(command: Command) -> Command:
    """Decorator: the weights_options, --sa and --kv-dtype."""
    return weights_options(SHARING(KV_DTYPE(command)))


class OutputFile(click.Path):
    """The path of a file to write, refused before any work if its folder or its suffix is wrong."""

    def __init__(self, suffix: str = "") -> None:
        super().__init__(dir_okay=False)
        self.suffix = suffix

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        path = str(super().convert(value, param, ctx))
        if not (os.access(os.path.dirname(path) or ".", os.W_OK) and path.endswith(self.suffix)):
            kind = f"a {self.suffix} file" if self.suffix else "a file"
            self.fail(f"{path}: expected {kind} in a folder that can be written to", param, ctx)
        return path


class Finite(click.FloatRange):
    """A number in a range; click's own takes infinity and NaN as well."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number", param, ctx)
        return number


def keep_apart(written: Mapping[str, str | Path | None], *read: tuple[str, str | None]) -> None:
    """Raises MinisaError if a flag names a file to write that another flag, of (flag, path), writes or reads too."""
    flags: dict[str, str] = {}
    for flag, path in (*written.items(), *read):
        if path is not None and (other := flags.get(os.path.realpath(path))):
            raise MinisaError(f"{flag} {path}: {other} names the same file: give another")
        if path is not None and flag in written:
            flags[os.path.realpath(path)] = flag


def run(command: click.Command) -> NoReturn:
    """Run a command line; what the user can put right is one line on stderr and exit status 2."""
    name = Path(sys.argv[0]).name.replace("__main__.py", "python -m minisa")
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that what is at work tidies up
    raise_interrupts()
    try:
        status = command.main(prog_name=name, standalone_mode=False, help_option_names=["-h", "--help"])
        sys.stdout.flush()
    except (MinisaError, click.ClickException) as error:
        _fail(name, error.format_message() if isinstance(error, click.ClickException) else str(error))
    except (KeyboardInterrupt, click.Abort):
        sys.exit(130)
    except OSError as error:
        if error.errno in (errno.EPIPE, errno.ENOSPC):  # of stdout, maybe: at exit Python would write once more
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if isinstance(error, BrokenPipeError):  # the reader has left
            sys.exit(1)
        _fail(name, f"{error.filename or 'input or output'}: {error.strerror or error}")
    except (MemoryError, RuntimeError) as error:
        from minisa.device import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        _fail(name, "the device is out of memory: take a shorter context, a smaller --dtype or another --device")
    sys.exit(status if isinstance(status, int) else 0)


def _fail(name: str, message: str) -> NoReturn:
    click.echo(f"{name}: {' '.join(message.split())}", err=True)
    sys.exit(2)


def open_model(model: str, **options: Any) -> LLM:
    """`minisa.load` with a progress bar; the default model is fetched first if it is not there yet."""
    from minisa.engine import load

    fetch_default(model)
    with _Bar(f"loading {model}") as bar:
        return load(model, progress=bar.update, **options)


def fetch_default(model: str) -> None:
    """Fetch the default model, if that is the one meant and it is not here yet."""
    if model == DEFAULT_MODEL and local_path(find(model)) is None:
        fetch(find(model))


def fetch(entry: ModelEntry) -> Path:
    """Download a model's files, saying what, how large, under which licence and where to."""
    size, source = f"{entry.size / 1e6:,.0f} MB", f"from {entry.source} to {weights_dir()}"
    click.echo(f"{entry.name}: {size}, licence {entry.licence}, {source}", err=True)
    with contextlib.ExitStack() as stack:
        bars: dict[str, _Bar] = {}

        def show(file: str, done: int, total: int | None) -> None:
            if file not in bars:
                bars[file] = stack.enter_context(_Bar(file))
            bars[file].update(done, total)

        return pull(entry, progress=show)


def write_json(path: str, record: Mapping[str, Any]) -> None:
    write_whole(Path(path), json.dumps(record, indent=1) + "\n")


class _Bar(contextlib.ExitStack):
    """click's progress bar, begun when the total is known; silent where stderr is not a terminal."""

    def __init__(self, label: str) -> None:
        super().__init__()
        self._label, self._done = label, 0
        self._bar: Any = None

    def update(self, done: int, total: int | None) -> None:
        if total and sys.stderr.isatty():
            if self._bar is None:
                bar = click.progressbar(length=total, label=self._label, file=sys.stderr, show_pos=False)
                self._bar = self.enter_context(bar)
            self._bar.update(done - self._done)
            self._done = done
